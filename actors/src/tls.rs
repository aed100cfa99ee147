//! Encryption between nodes: mutual TLS for gRPC and for the mesh, from nothing but the cluster
//! secret.
//!
//! ```text
//!  secret ─ derive ─▶ the cluster's own authority (Ed25519; the same on every node)
//!                        └─ signs ─▶ this run's certificate (P-256; its key never leaves memory)
//! ```
//!
//! Whoever knows the secret can make a certificate that every node accepts, and nobody else can:
//! a finished handshake *is* the proof of the secret, before a byte of a request is decoded. All
//! nodes are alike and their addresses change, so every certificate carries one name,
//! [`PEER_NAME`], and no address. A certificate does not expire; a new secret ends all of them.
//!
//! Clients may use the gRPC port too, without a certificate; they get the operator's.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use shoal_proto::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::server::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// The name in every node's certificate.
pub const PEER_NAME: &str = "peer.shoal.internal";
/// How long a stranger may take over a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes under way at once on one port; beyond them connections wait in the kernel.
const MAX_HANDSHAKES: usize = 256;
/// Failed handshakes are all counted, and logged this often at most.
const LOG_PAUSE: Duration = Duration::from_secs(10);
/// What stands before the 32 bytes of an Ed25519 key in PKCS #8 (RFC 8410, section 7).
const PKCS8_ED25519: [u8; 16] = [0x30, 46, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 34, 4, 32];

/// What a node needs to prove itself to others and to check them. Cheap to clone.
#[derive(Clone)]
pub struct PeerTls {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    channels: ClientTlsConfig,
}

impl PeerTls {
    /// The authority of a secret, and a fresh certificate of this node. `public` is what
    /// clients of the gRPC port are shown instead: a chain and its key, in PEM.
    ///
    /// # Errors
    /// When the operator's certificate or key cannot be read.
    pub fn new(secret: &str, public: Option<(&[u8], &[u8])>) -> Result<PeerTls, Error> {
        let failed = |error: &dyn std::fmt::Display| Error::internal(format!("TLS between nodes: {error}"));
        let (authority, certificate, key) = issue(secret).map_err(|error| failed(&error))?;
        let identity = Identity::from_pem(certificate.pem(), key.serialize_pem());
        let channels = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(authority.pem()))
            .domain_name(PEER_NAME)
            .identity(identity);

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(authority.der().clone()).map_err(|error| failed(&error))?;
        let roots = Arc::new(roots);
        let chain = vec![certificate.der().clone()];
        let private = || PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));

        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| failed(&error))?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(chain.clone(), private())
            .map_err(|error| failed(&error))?;

        let peer = CertifiedKey::from_der(chain, private(), &provider).map_err(|error| failed(&error))?;
        let public = match public {
            None => None,
            Some((chain, key)) => {
                let refused = |error: &dyn std::fmt::Display| {
                    Error::invalid("tls_cert", format!("with its key: {error}"))
                };
                let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
                let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| refused(&error))?;
                let chain = chain.map_err(|error| refused(&error))?;
                let pair = CertifiedKey::from_der(chain, key, &provider).map_err(|error| refused(&error))?;
                Some(Arc::new(pair))
            }
        };
        // Strangers may connect: what they may call is decided per service, by [`Incoming`].
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .allow_unauthenticated()
            .build()
            .map_err(|error| failed(&error))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| failed(&error))?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(Certificates { peer: Arc::new(peer), public }));
        server.alpn_protocols = vec![b"h2".to_vec()];
        Ok(PeerTls { server: Arc::new(server), client: Arc::new(client), channels })
    }

    /// For gRPC channels to peers.
    pub fn channels(&self) -> ClientTlsConfig {
        self.channels.clone()
    }

    /// For connections of the mesh: how to connect, and the name to expect.
    pub(crate) fn connector(&self) -> (TlsConnector, ServerName<'static>) {
        let name = ServerName::try_from(PEER_NAME).expect("the constant is a DNS name");
        (TlsConnector::from(self.client.clone()), name)
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.server.clone())
    }

    /// Accepts connections for as long as the process runs, and hands over each when its
    /// handshake is done. A slow handshake holds up no other. With `allow_plain`, connections
    /// that do not begin with a handshake are handed over as they are.
    pub async fn accept(
        &self,
        listener: TcpListener,
        allow_plain: bool,
        taken: impl Fn(Incoming) + Clone + Send + 'static,
    ) {
        let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
        let complaints = Arc::new(Mutex::new(None));
        loop {
            let Ok(permit) = handshakes.clone().acquire_owned().await else { return };
            let (stream, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    // Most likely there are no descriptors left: at once would only spin.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let (acceptor, taken, complaints) = (self.acceptor(), taken.clone(), complaints.clone());
            tokio::spawn(async move {
                let _permit = permit;
                let shaken =
                    tokio::time::timeout(HANDSHAKE_TIMEOUT, shake(acceptor, stream, allow_plain)).await;
                match shaken {
                    Ok(Ok(incoming)) => taken(incoming),
                    Ok(Err(error)) => complain(&complaints, from, &error.to_string()),
                    Err(_) => complain(&complaints, from, "it took too long"),
                }
            });
        }
    }
}

/// A connection that was accepted.
pub enum Incoming {
    /// Encrypted; the other side may or may not have proven that it is a peer.
    Tls(Box<TlsStream<TcpStream>>),
    /// As it came.
    Plain(TcpStream),
}

impl Incoming {
    /// Whether the other side has proven that it knows the cluster secret.
    pub fn is_peer(&self) -> bool {
        match self {
            // The verifier has checked whatever certificate was shown.
            Incoming::Tls(stream) => stream.get_ref().1.peer_certificates().is_some(),
            Incoming::Plain(_) => false,
        }
    }
}

async fn shake(acceptor: TlsAcceptor, stream: TcpStream, allow_plain: bool) -> std::io::Result<Incoming> {
    stream.set_nodelay(true)?;
    /// The first byte of a TLS handshake record (RFC 8446, section 5.1).
    const HANDSHAKE: u8 = 22;
    let mut first = [0];
    if allow_plain && stream.peek(&mut first).await? == 1 && first[0] != HANDSHAKE {
        return Ok(Incoming::Plain(stream));
    }
    Ok(Incoming::Tls(Box::new(acceptor.accept(stream).await?)))
}

fn complain(last: &Mutex<Option<Instant>>, from: SocketAddr, reason: &str) {
    metrics::counter!("shoal_tls_handshake_failures_total").increment(1);
    let mut last = last.lock();
    if last.is_none_or(|at: Instant| at.elapsed() > LOG_PAUSE) {
        *last = Some(Instant::now());
        tracing::warn!(%from, reason, "a TLS handshake failed; a node with another cluster secret looks like this");
    }
}

/// Which certificate to show: peers ask for theirs by name.
#[derive(Debug)]
struct Certificates {
    peer: Arc<CertifiedKey>,
    public: Option<Arc<CertifiedKey>>,
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        match (&self.public, hello.server_name()) {
            (Some(public), name) if name != Some(PEER_NAME) => Some(public.clone()),
            _ => Some(self.peer.clone()),
        }
    }
}

/// The authority's certificate, and a fresh one with its key under it.
fn issue(secret: &str) -> Result<(rcgen::Certificate, rcgen::Certificate, KeyPair), rcgen::Error> {
    let seed = blake3::derive_key("shoal 2026 peer certificate authority", secret.as_bytes());
    let pkcs8 = PrivatePkcs8KeyDer::from([&PKCS8_ED25519[..], &seed].concat());
    let authority_key = KeyPair::try_from(&pkcs8)?;
    let named = |name: &str| {
        let mut subject = DistinguishedName::new();
        subject.push(DnType::CommonName, name);
        subject
    };
    let mut authority = CertificateParams::default();
    authority.distinguished_name = named("shoal cluster");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let authority_certificate = authority.self_signed(&authority_key)?;

    let key = KeyPair::generate()?;
    let mut leaf = CertificateParams::new(vec![PEER_NAME.to_owned()])?;
    leaf.distinguished_name = named("shoal node");
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let certificate = leaf.signed_by(&key, &Issuer::from_params(&authority, &authority_key))?;
    Ok((authority_certificate, certificate, key))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn served(secret: &str, allow_plain: bool) -> (SocketAddr, mpsc::Receiver<(bool, bool)>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let tls = PeerTls::new(secret, None).expect("certificates");
        let (sender, receiver) = mpsc::channel();
        tokio::spawn(async move {
            let taken = move |incoming: Incoming| {
                let plain = matches!(incoming, Incoming::Plain(_));
                sender.send((incoming.is_peer(), plain)).expect("the test listens");
                // An answer tells the client that the server has accepted its certificate.
                tokio::spawn(async move {
                    match incoming {
                        Incoming::Tls(mut stream) => drop(stream.write_all(b"hello").await),
                        Incoming::Plain(mut stream) => drop(stream.write_all(b"hello").await),
                    }
                });
            };
            tls.accept(listener, allow_plain, taken).await;
        });
        (address, receiver)
    }

    async fn greeted(secret: &str, address: SocketAddr) -> bool {
        let (connector, name) = PeerTls::new(secret, None).expect("certificates").connector();
        let stream = TcpStream::connect(address).await.expect("connects");
        let Ok(mut stream) = connector.connect(name, stream).await else { return false };
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).await.is_ok() && &answer == b"hello"
    }

    #[tokio::test]
    async fn only_the_same_secret_is_a_peer() {
        let (address, taken) = served("one", false).await;
        assert!(greeted("one", address).await, "two runs with one secret trust each other");
        assert_eq!(taken.recv(), Ok((true, false)));
        assert!(!greeted("other", address).await, "another secret is another authority");
        assert!(taken.try_recv().is_err(), "nothing of it was handed over");
    }

    #[tokio::test]
    async fn plain_connections_are_taken_only_where_they_may() {
        for (allowed, expected) in [(true, Some((false, true))), (false, None)] {
            let (address, taken) = served("one", allowed).await;
            let mut stream = TcpStream::connect(address).await.expect("connects");
            stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("sent");
            let mut answer = [0; 5];
            let answered = stream.read_exact(&mut answer).await.is_ok_and(|_| &answer == b"hello");
            assert_eq!((answered, taken.try_recv().ok()), (allowed, expected));
        }
    }

    #[tokio::test]
    async fn a_stalled_handshake_holds_up_nobody() {
        let (address, _taken) = served("one", false).await;
        let _silent = TcpStream::connect(address).await.expect("connects");
        let greeted = tokio::time::timeout(Duration::from_secs(2), greeted("one", address)).await;
        assert_eq!(greeted, Ok(true));
    }
}
