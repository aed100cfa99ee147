//! One name, one node: whether the member is gone whose name another data directory asks for.
//!
//! A pod that lost its volume comes back under its old name, and is to take the place of what it was. A
//! second process under the name of a node that lives, by a configuration that was copied, must not: that
//! node would be taken out of the cluster with all that it holds. So the member is asked, and only its own
//! data directory counts as an answer: an address changes hands. It counts as gone when somebody else answers
//! where it was, or nobody for [`PATIENCE`]. Whoever is asked to take the newcomer in asks; a member that
//! only this node cannot reach is taken for gone as well.

use std::time::{Duration, Instant};

use futures::future::join;
use shoal_proto::peer::{HelloReply, HelloRequest};
use shoal_proto::{Error, ErrorCode, NodeId};
use shoal_raft::cluster::{ClusterState, Node};
use shoal_raft::{Client, Lane, Peers};

use crate::cluster::Cluster;

/// How long a member that does not answer is asked again.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long one answer may take.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// The pause between two questions.
const PAUSE: Duration = Duration::from_millis(200);

/// What an answer from where a member was says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    /// It is the member.
    Lives,
    /// Somebody else is there now.
    Gone,
    /// It may be the member, which has only just started.
    Unclear,
}

/// The member of a name that a new data directory is to take the place of, once it is sure to be gone; none
/// when nobody has the name.
///
/// # Errors
/// Conflict when it lives; unavailable when the control group does not answer in time.
pub(crate) async fn found_gone(
    cluster: &Cluster,
    name: &str,
    incarnation: &str,
) -> Result<Option<NodeId>, Error> {
    let end = Instant::now() + PATIENCE;
    // By the latest state: it knows the latest address.
    let state = cluster.fresh_state(end).await?;
    let Some((id, member)) = member_called(&state, name, incarnation) else { return Ok(None) };
    if id == cluster.node() {
        return Err(lives(name, id));
    }
    loop {
        match ask(cluster.groups().peers(), &state, id, member).await {
            Word::Lives => return Err(lives(name, id)),
            Word::Gone => return Ok(Some(id)),
            Word::Unclear if Instant::now() >= end => return Ok(Some(id)),
            Word::Unclear => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// The member of a name, if it is of another data directory. One that was removed is refused by the control
/// group.
fn member_called<'a>(state: &'a ClusterState, name: &str, incarnation: &str) -> Option<(NodeId, &'a Node)> {
    if state.gone.contains_key(incarnation) {
        return None;
    }
    let mut called = state.nodes.iter().filter(|(_, node)| node.name == name);
    called.find(|(_, node)| node.incarnation != incarnation).map(|(id, node)| (*id, node))
}

fn lives(name: &str, id: NodeId) -> Error {
    let message = format!(
        "a node called `{name}` lives (id {id}): choose another name, or drain that node and remove it"
    );
    Error::new(ErrorCode::Conflict, message)
}

/// Asks a member at the address that was agreed upon and at the one where it was met last.
async fn ask(peers: &Peers, state: &ClusterState, id: NodeId, member: &Node) -> Word {
    let agreed = hello(peers.client_at(&member.addresses.grpc));
    let (agreed, met) = join(agreed, hello(peers.client(id, Lane::Fast))).await;
    let of = |reply: Option<HelloReply>| {
        reply.map_or(Word::Unclear, |reply| word(id, member, &state.cluster_id, &reply))
    };
    let words = [of(agreed), of(met)];
    if words.contains(&Word::Lives) {
        Word::Lives
    } else if words.contains(&Word::Gone) {
        Word::Gone
    } else {
        Word::Unclear
    }
}

async fn hello(client: Result<Client, String>) -> Option<HelloReply> {
    let mut client = client.ok()?;
    let asked = client.hello(HelloRequest::default());
    Some(tokio::time::timeout(HELLO_TIMEOUT, asked).await.ok()?.ok()?.into_inner())
}

fn word(id: NodeId, member: &Node, cluster_id: &str, reply: &HelloReply) -> Word {
    match (reply.incarnation.as_str(), reply.node_id) {
        // An earlier build, or one that has not read its directory yet.
        ("", 0) => Word::Unclear,
        ("", node) if node == id.0 && reply.cluster_id == cluster_id => Word::Lives,
        (incarnation, _) if incarnation == member.incarnation => Word::Lives,
        _ => Word::Gone,
    }
}

#[cfg(test)]
mod tests {
    use shoal_raft::cluster::{Addresses, Command};

    use super::*;

    fn cluster_of_one() -> ClusterState {
        let mut state = ClusterState::default();
        state.apply(Command::CreateCluster { cluster_id: "c".to_owned() });
        state.apply(Command::AddNode {
            name: "a".to_owned(),
            incarnation: "inc-a".to_owned(),
            addresses: Addresses::default(),
            zone: String::new(),
        });
        state
    }

    #[test]
    fn only_the_members_own_directory_says_that_it_lives() {
        let state = cluster_of_one();
        let (id, member) = member_called(&state, "a", "inc-a2").expect("it has the name");
        let says = |incarnation: &str, node_id: u64, cluster_id: &str| {
            let (incarnation, cluster_id) = (incarnation.to_owned(), cluster_id.to_owned());
            word(id, member, "c", &HelloReply { incarnation, node_id, cluster_id, ..HelloReply::default() })
        };
        assert_eq!(says("inc-a", 1, "c"), Word::Lives);
        assert_eq!(says("inc-a", 0, ""), Word::Lives, "it is starting");
        assert_eq!(says("inc-a2", 0, ""), Word::Gone, "the newcomer itself, at the same address");
        assert_eq!(says("inc-b", 2, "c"), Word::Gone, "another node has the address now");
        assert_eq!(says("", 1, "c"), Word::Lives, "an earlier build");
        assert_eq!(says("", 0, ""), Word::Unclear, "an earlier build that is starting");
        assert_eq!(says("", 1, "other"), Word::Gone, "the first node of another cluster");
    }

    #[test]
    fn a_node_is_not_its_own_namesake() {
        let state = cluster_of_one();
        assert!(member_called(&state, "a", "inc-a").is_none());
        assert!(member_called(&state, "b", "inc-b").is_none());
    }
}
