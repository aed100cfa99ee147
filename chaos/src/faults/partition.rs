//! Broken networks: their shapes, as pairs of nodes of which the first does not reach the second,
//! and the faults that cut them.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use rand::RngExt;
use rand::rngs::StdRng;

use super::{Fault, names};
use crate::cluster::Cluster;

/// In a cut, the clients instead of a node.
pub const CLIENTS: usize = usize::MAX;

/// What a fault cuts between so many nodes when it aims at one of them; none when it cuts nothing.
pub fn cuts(fault: Fault, target: usize, nodes: usize) -> Option<BTreeSet<(usize, usize)>> {
    let others = || (0..nodes).filter(move |at| *at != target);
    Some(match fault {
        Fault::LeaderInMinority | Fault::IsolateFollower => between(&[target], &others().collect::<Vec<_>>()),
        Fault::LeaderInMajority => {
            let (majority, minority) = sides(target, nodes);
            between(&minority, &majority)
        }
        Fault::LeaderIsDeaf => others().map(|from| (from, target)).collect(),
        Fault::LeaderIsMute => others().map(|to| (target, to)).collect(),
        Fault::Bridge => bridge(nodes),
        Fault::MajorityRing => ring(nodes),
        Fault::AnswersLost => BTreeSet::from([(target, CLIENTS)]),
        _ => return None,
    })
}

/// The nodes that cuts isolate, when they do that and nothing else: none of these nodes reaches any
/// other or is reached, and all others reach each other.
pub fn isolated(cuts: &BTreeSet<(usize, usize)>, nodes: usize) -> Option<BTreeSet<usize>> {
    let alone = |node: &usize| {
        let mut others = (0..nodes).filter(|other| other != node).peekable();
        others.peek().is_some()
            && others.all(|other| cuts.contains(&(*node, other)) && cuts.contains(&(other, *node)))
    };
    let isolated: BTreeSet<usize> = (0..nodes).filter(alone).collect();
    let is_explained = |(from, to): &(usize, usize)| isolated.contains(from) || isolated.contains(to);
    let is_clients = |(from, to): &(usize, usize)| *from == CLIENTS || *to == CLIENTS;
    cuts.iter().all(|pair| is_explained(pair) && !is_clients(pair)).then_some(isolated)
}

/// Cuts the network as a fault does, and says what it was done to.
///
/// # Errors
/// When the nodes' backend cannot cut it so, or the fault cuts nothing.
pub async fn begin(fault: Fault, cluster: &Cluster, coin: &mut StdRng) -> Result<String> {
    let nodes = cluster.len();
    let target = match fault {
        Fault::Bridge | Fault::MajorityRing => nodes / 2,
        Fault::IsolateFollower => cluster.follower().await?,
        Fault::AnswersLost => coin.random_range(0..nodes),
        _ => cluster.leader().await?,
    };
    let cuts = cuts(fault, target, nodes).with_context(|| format!("{} cuts nothing", fault.name()))?;
    cluster.backend.cut(&cuts)?;
    let detail = match fault {
        Fault::LeaderInMajority => {
            let (majority, minority) = sides(target, nodes);
            format!("{} with the leader, {} apart", names(&majority), names(&minority))
        }
        Fault::Bridge => format!("{} is the bridge", names(&[target])),
        Fault::MajorityRing => "everybody sees neighbours".to_owned(),
        _ => names(&[target]),
    };
    Ok(match cluster.backend.isolates_from_clients() {
        true => format!("{detail}; cut off from clients too"),
        false => detail,
    })
}

/// A majority with this node, and the rest.
fn sides(node: usize, nodes: usize) -> (Vec<usize>, Vec<usize>) {
    let minority: Vec<usize> = (0..nodes).filter(|at| *at != node).take((nodes - 1) / 2).collect();
    ((0..nodes).filter(|at| !minority.contains(at)).collect(), minority)
}

/// Both directions between every node of one side and every node of the other.
fn between(one: &[usize], other: &[usize]) -> BTreeSet<(usize, usize)> {
    let pairs = one.iter().flat_map(|a| other.iter().map(move |b| (*a, *b)));
    pairs.flat_map(|(a, b)| [(a, b), (b, a)]).collect()
}

/// Every node reaches only its own neighbours on a ring, so that each sees a majority of five
/// and no two see the same one.
fn ring(nodes: usize) -> BTreeSet<(usize, usize)> {
    let reach = nodes / 4;
    let distance = |a: usize, b: usize| a.abs_diff(b).min(nodes - a.abs_diff(b));
    let pairs = (0..nodes).flat_map(|a| (0..nodes).map(move |b| (a, b)));
    pairs.filter(|(a, b)| distance(*a, *b) > reach.max(1)).collect()
}

/// One node sees both halves, which do not see each other.
fn bridge(nodes: usize) -> BTreeSet<(usize, usize)> {
    let half = nodes / 2;
    let (one, other): (Vec<usize>, Vec<usize>) = ((0..half).collect(), (half + 1..nodes).collect());
    between(&one, &other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_of_partitions() {
        assert_eq!(between(&[0], &[1, 2]), BTreeSet::from([(0, 1), (1, 0), (0, 2), (2, 0)]));
        // Of five each reaches itself and two others.
        let cuts = ring(5);
        assert!((0..5).all(|a| cuts.iter().filter(|(from, _)| *from == a).count() == 2), "{cuts:?}");
        // Of three, node 1 is the bridge between 0 and 2.
        assert_eq!(bridge(3), between(&[0], &[2]));
        assert_eq!(bridge(5), between(&[0, 1], &[3, 4]));
    }

    #[test]
    fn the_leader_is_with_the_majority() {
        assert_eq!(sides(1, 3), (vec![1, 2], vec![0]));
        assert_eq!(sides(1, 5), (vec![1, 3, 4], vec![0, 2]));
    }

    #[test]
    fn cuts_that_isolate_whole_nodes() {
        let isolated_by = |fault: Fault, nodes: usize| -> Option<Vec<usize>> {
            Some(isolated(&cuts(fault, 1, nodes).expect("it cuts"), nodes)?.into_iter().collect())
        };
        assert_eq!(isolated_by(Fault::LeaderInMinority, 3), Some(vec![1]));
        assert_eq!(isolated_by(Fault::IsolateFollower, 5), Some(vec![1]));
        // One of three is apart; two of five are, and still see each other.
        assert_eq!(isolated_by(Fault::LeaderInMajority, 3), Some(vec![0]));
        assert_eq!(isolated_by(Fault::LeaderInMajority, 5), None);
        for fault in [Fault::LeaderIsDeaf, Fault::LeaderIsMute, Fault::Bridge, Fault::AnswersLost] {
            assert_eq!(isolated_by(fault, 3), None, "{}", fault.name());
        }
        assert_eq!(isolated_by(Fault::MajorityRing, 5), None);
        assert_eq!(cuts(Fault::KillLeader, 1, 3), None);
    }

    #[test]
    fn several_nodes_are_isolated_from_each_other_too() {
        let two = &between(&[0], &[1, 2, 3]) | &between(&[1], &[2, 3]);
        assert_eq!(isolated(&two, 4), Some(BTreeSet::from([0, 1])));
        assert_eq!(isolated(&BTreeSet::new(), 3), Some(BTreeSet::new()), "whole again");
        assert_eq!(isolated(&BTreeSet::new(), 1), Some(BTreeSet::new()));
        let with_clients = &between(&[0], &[1, 2]) | &BTreeSet::from([(0, CLIENTS)]);
        assert_eq!(isolated(&with_clients, 3), None);
    }
}
