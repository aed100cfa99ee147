//! The operator's certificate for HTTPS: when it ends. Who serves it decides what to make of that; here
//! is no clock. The certificates that nodes show each other do not end, see [`shoal_actors::tls`].

use anyhow::{Context, Result, anyhow};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::parse_x509_certificate;

/// The Unix time in seconds after which clients refuse the first certificate of a chain in PEM, the one
/// that stands for this node.
///
/// # Errors
/// When there is no certificate, or it cannot be read.
pub fn expires_at(chain: &[u8]) -> Result<i64> {
    let first = CertificateDer::pem_slice_iter(chain).next().context("no certificate in it")?;
    let first = first.map_err(|error| anyhow!("{error}"))?;
    let (_, certificate) = parse_x509_certificate(&first).map_err(|error| anyhow!("{error}"))?;
    Ok(certificate.validity().not_after.timestamp())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    fn until(year: i32) -> String {
        let mut params = CertificateParams::new(vec!["shoal.example.com".to_owned()]).expect("a DNS name");
        params.not_after = date_time_ymd(year, 5, 17);
        params.self_signed(&KeyPair::generate().expect("a key")).expect("a certificate").pem()
    }

    #[test]
    fn the_first_of_a_chain_counts() {
        let chain = until(2031) + &until(2030);
        // date -u -d 2031-05-17 +%s
        assert_eq!(expires_at(chain.as_bytes()).expect("a chain"), 1_936_742_400);
        // From 2050 on the date is encoded in another way (RFC 5280, section 4.1.2.5).
        assert_eq!(expires_at(until(2051).as_bytes()).expect("a chain"), 2_567_894_400);
    }

    #[test]
    fn what_is_no_certificate_is_refused() {
        let key = KeyPair::generate().expect("a key").serialize_pem();
        let damaged = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for chain in ["", "not a certificate", key.as_str(), damaged] {
            assert!(expires_at(chain.as_bytes()).is_err(), "{chain:?} was read");
        }
    }
}
