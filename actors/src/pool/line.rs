//! Who works and who waits. Pure.

use std::collections::VecDeque;

/// Free workers, or pieces of work that wait for one; never both.
pub(super) struct Line<W, J> {
    free: Vec<W>,
    waiting: VecDeque<J>,
    /// So many may wait.
    limit: usize,
}

/// What becomes of a piece of work.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Placed<W, J> {
    /// This worker is to do it now.
    Begins(W, J),
    /// It waits in line.
    Waits,
    /// There is no place for it.
    Refused(J),
}

impl<W, J> Line<W, J> {
    /// Nobody works and nobody waits.
    pub(super) fn new(limit: usize) -> Line<W, J> {
        Line { free: Vec::new(), waiting: VecDeque::new(), limit }
    }

    /// Whether a worker is free.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// A new piece of work. Of those in line, the ones that nobody waits for any more make room.
    pub(super) fn add(&mut self, job: J, may_wait: bool, is_abandoned: impl Fn(&J) -> bool) -> Placed<W, J> {
        if let Some(worker) = self.free.pop() {
            return Placed::Begins(worker, job);
        }
        if self.waiting.len() >= self.limit {
            self.waiting.retain(|job| !is_abandoned(job));
        }
        if !may_wait || self.waiting.len() >= self.limit {
            return Placed::Refused(job);
        }
        self.waiting.push_back(job);
        Placed::Waits
    }

    /// A worker is free, because it is done or new. Returns what it is to do next, if anything.
    pub(super) fn freed(&mut self, worker: W, is_abandoned: impl Fn(&J) -> bool) -> Option<(W, J)> {
        while let Some(job) = self.waiting.pop_front() {
            if !is_abandoned(&job) {
                return Some((worker, job));
            }
        }
        self.free.push(worker);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(_: &&str) -> bool {
        false
    }

    #[test]
    fn work_waits_in_its_order_and_is_refused_when_the_line_is_full() {
        let mut line: Line<u32, &str> = Line::new(2);
        assert!(!line.has_room());
        assert_eq!(line.add("a", false, wanted), Placed::Refused("a"), "nobody works yet");
        assert_eq!(line.freed(1, wanted), None);
        assert!(line.has_room());
        assert_eq!(line.add("a", false, wanted), Placed::Begins(1, "a"));
        assert_eq!(line.add("b", true, wanted), Placed::Waits);
        assert_eq!(line.add("c", false, wanted), Placed::Refused("c"));
        assert_eq!(line.add("d", true, wanted), Placed::Waits);
        assert_eq!(line.add("e", true, wanted), Placed::Refused("e"));
        assert_eq!(line.freed(1, wanted), Some((1, "b")));
        assert_eq!(line.freed(1, wanted), Some((1, "d")));
        assert_eq!(line.freed(1, wanted), None);
        assert!(line.has_room());
    }

    #[test]
    fn what_nobody_waits_for_any_more_is_not_done_and_takes_no_place() {
        let is_gone = |job: &&str| *job == "gone";
        let mut line: Line<u32, &str> = Line::new(2);
        assert_eq!(line.add("gone", true, is_gone), Placed::Waits);
        assert_eq!(line.add("b", true, is_gone), Placed::Waits);
        assert_eq!(line.add("c", true, is_gone), Placed::Waits, "in the place of who has gone");
        assert_eq!(line.add("d", true, is_gone), Placed::Refused("d"));
        assert_eq!(line.freed(1, |job| *job == "b"), Some((1, "c")));
    }
}
