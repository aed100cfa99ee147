//! The Service in front of the pods: one address that outlives all of theirs.
//!
//! A new connection goes to one of the pods that are ready, to each in turn, and stays there until either side
//! ends it. While no pod is ready, a connection is closed as soon as it is made.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use tokio::net::{TcpListener, TcpStream};

use crate::client::Client;
use crate::node::KEY;

/// How many connections a client may go through in turn.
const CONNECTIONS: usize = 3;

/// The addresses of the pods that are ready, by the pods' names.
type Endpoints = Arc<Mutex<BTreeMap<String, String>>>;

/// A service. Clones are the same one; it lasts as long as the runtime.
#[derive(Clone)]
pub struct Service {
    address: String,
    endpoints: Endpoints,
}

impl Service {
    /// Opens one that leads nowhere yet.
    ///
    /// # Errors
    /// When no port is free.
    pub async fn open() -> Result<Service> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let endpoints = Endpoints::default();
        tokio::spawn(accept(listener, endpoints.clone()));
        Ok(Service { address, endpoints })
    }

    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A client of whatever pods are ready. It knows the one address several times: when the pod behind one
    /// connection does not answer, it goes on to the next connection, which may lead to another pod.
    pub fn client(&self) -> Client {
        Client::new(vec![self.address.clone(); CONNECTIONS], Some(KEY))
    }

    /// Leads new connections to a pod, too.
    pub fn add(&self, pod: &str, address: &str) {
        let mut endpoints = self.endpoints.lock().expect("nothing panics while it holds the lock");
        endpoints.insert(pod.to_owned(), address.to_owned());
    }

    /// Leads no new connection to a pod. Harmless when it did not.
    pub fn remove(&self, pod: &str) {
        self.endpoints.lock().expect("nothing panics while it holds the lock").remove(pod);
    }
}

async fn accept(listener: TcpListener, endpoints: Endpoints) {
    for turn in 0.. {
        // An accept fails when its client has gone already.
        let Ok((client, _)) = listener.accept().await else { continue };
        let Some(address) = choose(&endpoints, turn) else { continue };
        tokio::spawn(async move {
            // However one side ends, the other sees its connection end.
            drop(forward(client, &address).await);
        });
    }
}

fn choose(endpoints: &Mutex<BTreeMap<String, String>>, turn: usize) -> Option<String> {
    let endpoints = endpoints.lock().expect("nothing panics while it holds the lock");
    let at = turn.checked_rem(endpoints.len())?;
    endpoints.values().nth(at).cloned()
}

async fn forward(mut client: TcpStream, address: &str) -> io::Result<()> {
    let mut pod = TcpStream::connect(address).await?;
    client.set_nodelay(true)?;
    pod.set_nodelay(true)?;
    tokio::io::copy_bidirectional(&mut client, &mut pod).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_go_to_the_ready_pods_in_turn() {
        let endpoints = Mutex::new(BTreeMap::new());
        assert_eq!(choose(&endpoints, 7), None);
        for pod in ["a", "b"] {
            endpoints.lock().unwrap().insert(pod.to_owned(), format!("{pod}:1"));
        }
        let chosen: Vec<Option<String>> = (0..3).map(|turn| choose(&endpoints, turn)).collect();
        assert_eq!(chosen, ["a:1", "b:1", "a:1"].map(|address| Some(address.to_owned())));
    }
}
