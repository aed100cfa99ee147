//! One attempt: what the old shards hold comes to the new ones, which then take their place.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use shoal_engine::backup::Archive;
use shoal_engine::check_point;
use shoal_engine::command::{
    Answer, Command, Document, Envelope, Point, Read, Replay, Seed, SeedPartial, StagedChunk,
};
use shoal_engine::reshard::Refusals;
use shoal_proto::{CollectionConfig, Error, ErrorCode, NodeId, RequestId, Route, ShardId, codec};
use shoal_raft::cluster::{self, ClusterState, Reshard};

use super::driver::Driver;
use super::progress::{PATIENCE, Progress};
use super::spool::Spool;
use super::{BUSY_PAUSE, STEP_TIMEOUT, TAIL_PAUSE};
use crate::call::Consistency;
use crate::cluster::{Cluster, ReadOptions};
use crate::entries::{bounded, by_shard, entries};
use crate::limits::MAX_ENTRY_BYTES;
use crate::scratch::{Scratch, ScratchCopy};

/// How long a replica may take to give its state.
const FETCH_TIMEOUT: Duration = Duration::from_secs(1200);
/// Entries on their way into the new shards at once.
const WRITES_AT_ONCE: usize = 8;
/// Bytes of points, and of documents, that are read of a copy at a time.
const READ_BYTES: usize = 8 << 20;
/// Answers to requests in one entry.
const ANSWERS_AT_ONCE: usize = 200;
/// The most documents in one entry.
const DOCUMENTS_AT_ONCE: usize = 50;
/// What a document takes in an entry besides its name and its attributes, in bytes, about.
const DOCUMENT_BYTES: usize = 256;
/// How long writes may be kept waiting: then the attempt has failed, and the old shards go on.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// The old shards are frozen when their logs have no more than this many entries that were not replayed.
const LITTLE: u64 = 200;

/// One attempt's work.
pub(super) struct Copying<'a> {
    cluster: &'a Cluster,
    scratch: &'a Path,
    by: RequestId,
    config: CollectionConfig,
    /// The old shards with their ranges.
    parents: Vec<(ShardId, (Route, Route))>,
    /// The new shards with theirs.
    children: Vec<(ShardId, (Route, Route))>,
}

/// An old shard, as far as it was copied.
struct Source {
    shard: ShardId,
    /// What its log indexes are counted from.
    base: u64,
    /// The last index that the new shards have.
    done: u64,
    /// What is in its log and was refused.
    refusals: Refusals,
    spool: Spool,
}

impl<'a> Copying<'a> {
    pub(super) fn new(
        driver: &'a Driver,
        state: &ClusterState,
        reshard: &Reshard,
    ) -> Result<Copying<'a>, Error> {
        let config = state.collection(&driver.name)?.1.config.clone();
        let with_range = |id: &ShardId| (*id, (state.shards[id].first, state.shards[id].last));
        Ok(Copying {
            cluster: &driver.cluster,
            scratch: &driver.scratch,
            by: reshard.id,
            config,
            parents: reshard.parents.iter().map(with_range).collect(),
            children: reshard.children.iter().map(with_range).collect(),
        })
    }

    /// # Errors
    /// Disk full, before anything is copied, when there is no room for it; busy when no end of the replaying is
    /// to be seen; anything else may be otherwise the next time.
    pub(super) async fn run(&self) -> Result<(), Error> {
        self.check_room().await?;
        let mut sources = Vec::new();
        for (parent, _) in &self.parents {
            sources.push(self.seed(*parent).await?);
        }
        self.catch_up(&mut sources).await?;
        let frozen = Instant::now();
        let passed_on = tokio::time::timeout(FREEZE_LIMIT, self.pass_on(&mut sources)).await;
        metrics::histogram!("shoal_reshard_frozen_seconds").record(frozen.elapsed().as_secs_f64());
        passed_on
            .map_err(|_| Error::unavailable(format!("it was not done within {FREEZE_LIMIT:?} of freezing")))?
    }

    /// Replays what is written meanwhile until little of it is left.
    async fn catch_up(&self, sources: &mut [Source]) -> Result<(), Error> {
        let mut progress = Progress::begin(Instant::now());
        loop {
            let mut left = 0u64;
            // In turn: while one catches up the other falls behind.
            for source in &mut *sources {
                let behind = source.spool.behind(source.done)?;
                if behind > LITTLE {
                    self.replay_some(source).await?;
                    left = left.saturating_add(behind);
                }
            }
            if left == 0 {
                return Ok(());
            }
            if !progress.goes_on(left, Instant::now()) {
                let message = format!(
                    "as much is written to the old shards as the new ones can take in: {left} entries are left, and \
                     that has hardly become less for {PATIENCE:?}"
                );
                return Err(Error::new(ErrorCode::Busy, message));
            }
        }
    }

    /// Freezes the old shards and lets the new ones take their place.
    async fn pass_on(&self, sources: &mut [Source]) -> Result<(), Error> {
        for source in sources {
            let last = self.freeze(source.shard).await?;
            source.spool.require(last);
            while source.done < last {
                self.replay_some(source).await?;
            }
        }
        let mut begins = BTreeMap::new();
        for (child, _) in &self.children {
            begins.insert(*child, self.write(*child, &Command::EndAdoption { by: self.by }).await?);
        }
        let end = cluster::Command::EndReshard { reshard: self.by, begins };
        if let Err(error) = self.cluster.control(end, Instant::now() + STEP_TIMEOUT).await {
            // An answer that was lost, and the repetition refused?
            let state = self.cluster.fresh_state(Instant::now() + STEP_TIMEOUT).await?;
            if !self.children.iter().all(|(child, _)| state.is_in_use(*child)) {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Freezes an old shard; one that is still frozen for an attempt that was given up thaws first.
    async fn freeze(&self, shard: ShardId) -> Result<u64, Error> {
        loop {
            match self.write(shard, &Command::Freeze { by: self.by }).await {
                Err(error) if error.code == ErrorCode::Conflict => tokio::time::sleep(BUSY_PAUSE).await,
                frozen => return frozen,
            }
        }
    }

    /// Brings what an old shard holds at one moment into the new ones.
    async fn seed(&self, parent: ShardId) -> Result<Source, Error> {
        // From now on its log is kept as it grows: it may be purged before the copy is through. After what it has
        // applied there is nothing, and how far that is comes with it.
        let (_, begin) = self.cluster.tail(parent, u64::MAX - 1, 0).await?;
        let path = self.scratch.join(format!("{}.tail", uuid::Uuid::new_v4()));
        let spool = Spool::begin(self.cluster.clone(), parent, begin, path)?;
        let (index, copy) = self.copy(parent, begin).await?;
        let source = copy.clone();
        let (base, frozen) =
            blocking(move || Ok((source.archive.base()?, source.archive.frozen_by()?))).await?;
        let empty = Seed {
            by: self.by,
            from: parent,
            parents: Vec::new(),
            version: base + index,
            points: Vec::new(),
            documents: Vec::new(),
            staged: Vec::new(),
            answers: Vec::new(),
            indexes: None,
        };
        self.seed_answers(&copy, &empty).await?;
        self.seed_points(&copy, &empty).await?;
        self.seed_documents(&copy, &empty).await?;
        self.seed_staged(&copy, &empty).await?;
        Ok(Source { shard: parent, base, done: index, refusals: Refusals::after(frozen), spool })
    }

    /// What is to go to a new shard, without any records yet.
    fn seed_for(&self, child: ShardId, empty: &Seed) -> Seed {
        Seed { parents: self.parts_of(child), ..empty.clone() }
    }

    /// The payload indexes, once, and the answers to requests, which concern every new shard.
    async fn seed_answers(&self, copy: &Arc<ScratchCopy>, empty: &Seed) -> Result<(), Error> {
        let (source, wanted) = (copy.clone(), self.config.payload_indexes.clone());
        let (indexes, answers) =
            blocking(move || Ok((source.archive.indexes()?.unwrap_or(wanted), source.archive.answers()?)))
                .await?;
        let is_first = self.parents.first().is_some_and(|(first, _)| *first == empty.from);
        for (child, _) in &self.children {
            let indexes = is_first.then(|| indexes.clone());
            self.write_seed(*child, Seed { indexes, ..self.seed_for(*child, empty) }).await?;
            // In their order: the oldest are forgotten first.
            for answers in answers.whole.chunks(ANSWERS_AT_ONCE) {
                let answers = answers.to_vec();
                self.write_seed(*child, Seed { answers, ..self.seed_for(*child, empty) }).await?;
            }
            for answers in answers.partial.chunks(ANSWERS_AT_ONCE) {
                let seed = SeedPartial { by: self.by, from: empty.from, answers: answers.to_vec() };
                self.write(*child, &Command::SeedPartial(Box::new(seed))).await?;
            }
        }
        Ok(())
    }

    async fn seed_points(&self, copy: &Arc<ScratchCopy>, empty: &Seed) -> Result<(), Error> {
        let mut after = None;
        loop {
            let config = self.config.clone();
            let (points, next) =
                next_batch(copy, after, move |archive, after| archive.points(&config, after, READ_BYTES))
                    .await?;
            after = next;
            if points.is_empty() {
                return Ok(());
            }
            let seeds = self.by_child(points, |point: &Point| point.id.route()).into_iter();
            let seeds = seeds
                .flat_map(|(child, points)| entries(points).into_iter().map(move |points| (child, points)));
            let seeds = seeds.map(|(child, points)| (child, Seed { points, ..self.seed_for(child, empty) }));
            self.write_seeds(seeds.collect()).await?;
        }
    }

    async fn seed_documents(&self, copy: &Arc<ScratchCopy>, empty: &Seed) -> Result<(), Error> {
        let mut after = None;
        loop {
            let (documents, next) =
                next_batch(copy, after, |archive, after| archive.documents(after, READ_BYTES)).await?;
            after = next;
            if documents.is_empty() {
                return Ok(());
            }
            let seeds = self.by_child(documents, |document: &Document| document.id.route()).into_iter();
            let seeds = seeds.flat_map(|(child, documents)| {
                let parts = bounded(documents, DOCUMENTS_AT_ONCE, document_bytes).into_iter();
                parts.map(move |documents| (child, documents))
            });
            let seeds =
                seeds.map(|(child, documents)| (child, Seed { documents, ..self.seed_for(child, empty) }));
            self.write_seeds(seeds.collect()).await?;
        }
    }

    async fn seed_staged(&self, copy: &Arc<ScratchCopy>, empty: &Seed) -> Result<(), Error> {
        let mut after = None;
        loop {
            let (staged, next) =
                next_batch(copy, after, |archive, after| archive.staged(after, MAX_ENTRY_BYTES)).await?;
            after = next;
            if staged.is_empty() {
                return Ok(());
            }
            let seeds = self.by_child(staged, |chunk: &StagedChunk| chunk.document.route()).into_iter();
            let seeds = seeds.map(|(child, staged)| (child, Seed { staged, ..self.seed_for(child, empty) }));
            self.write_seeds(seeds.collect()).await?;
        }
    }

    /// A copy of an old shard in files of this node, and the last index that it has: `least` or a later one,
    /// since what comes after is in the log.
    async fn copy(&self, parent: ShardId, least: u64) -> Result<(u64, Arc<ScratchCopy>), Error> {
        let mut reason = String::from("it has no replicas");
        for node in self.cluster.holders(parent) {
            let fetch = self.cluster.groups().fetch_state(parent.into(), node);
            let (index, file) = match tokio::time::timeout(FETCH_TIMEOUT, fetch).await {
                Ok(Ok((_, index, _))) if index < least => {
                    reason = format!("node {node} is at {index} of {least}");
                    continue;
                }
                Ok(Ok((_, index, file))) => (index, file),
                Ok(Err(error)) => {
                    reason = format!("node {node}: {error}");
                    continue;
                }
                Err(_) => {
                    reason = format!("node {node} took too long");
                    continue;
                }
            };
            let dir = Scratch(self.scratch.join(uuid::Uuid::new_v4().to_string()));
            let copied = blocking(move || {
                let mut archive = Archive::create(&dir.0)?;
                archive.take_file(&file.0)?;
                Ok(ScratchCopy { archive, _dir: dir })
            })
            .await;
            match copied {
                Ok(copy) => return Ok((index, Arc::new(copy))),
                // It is this node's disk, whoever gives the state.
                Err(error) if error.code == ErrorCode::DiskFull => return Err(error),
                Err(error) => reason = format!("node {node}: {error}"),
            }
        }
        Err(Error::unavailable(format!("no replica of shard {parent} gives its state: {reason}")))
    }

    /// Whether there is room: on this node for an export of the largest old shard and the store that is made of
    /// it, and on the nodes of the new ones for what they are to hold, in stores and graphs.
    async fn check_room(&self) -> Result<(), Error> {
        let mut options = ReadOptions::linearizable(Instant::now() + STEP_TIMEOUT);
        options.level = Consistency::Eventual;
        let (mut largest, mut all) = (0, 0);
        for (parent, _) in &self.parents {
            if let Answer::Stats(stats) = self.cluster.read(*parent, Read::Stats, &options).await?.0 {
                largest = stats.disk_bytes.max(largest);
                all += stats.disk_bytes;
            }
        }
        let state = self.cluster.state();
        let children = self.children.iter().filter_map(|(child, _)| state.shards.get(child));
        let holders: BTreeSet<NodeId> = children.flat_map(|shard| shard.replicas.clone()).collect();
        let mut needed = BTreeMap::from([(self.cluster.node(), 2 * largest)]);
        for node in holders {
            *needed.entry(node).or_default() += 2 * all;
        }
        let reports = self.cluster.reports().await;
        for (node, bytes) in needed {
            let Some(report) = reports.get(&node) else { continue };
            let free = report.disk_free_bytes;
            // A node that has just started does not know yet how much is free.
            if !report.is_writable || (1..bytes).contains(&free) {
                let message = format!(
                    "the disk of node {node} has no room for it: {bytes} bytes are needed, {free} free"
                );
                return Err(Error::new(ErrorCode::DiskFull, message));
            }
        }
        Ok(())
    }

    /// The old shards, with the first and the last route of what comes from each to a new one.
    fn parts_of(&self, child: ShardId) -> Vec<(ShardId, Route, Route)> {
        let (first, last) = self.range_of(child);
        let parts =
            self.parents.iter().map(|(parent, (from, to))| (*parent, first.max(*from), last.min(*to)));
        parts.filter(|(_, from, to)| from <= to).collect()
    }

    fn range_of(&self, child: ShardId) -> (Route, Route) {
        let known = self.children.iter().find(|(id, _)| *id == child);
        known.expect("what is seeded is one of the new shards").1
    }

    fn child_of(&self, route: Route) -> ShardId {
        let owner = self.children.iter().find(|(_, (first, last))| (*first..=*last).contains(&route));
        owner.expect("the new shards cover what the old ones do").0
    }

    fn by_child<T>(&self, all: Vec<T>, route: impl Fn(&T) -> Route) -> BTreeMap<ShardId, Vec<T>> {
        by_shard(all, |one| self.child_of(route(one)))
    }

    async fn write_seeds(&self, seeds: Vec<(ShardId, Seed)>) -> Result<(), Error> {
        let writes: Vec<_> = seeds.into_iter().map(|(child, seed)| self.write_seed(child, seed)).collect();
        futures::stream::iter(writes).buffer_unordered(WRITES_AT_ONCE).try_collect().await
    }

    async fn write_seed(&self, child: ShardId, seed: Seed) -> Result<(), Error> {
        self.write(child, &Command::Seed(Box::new(seed))).await.map(drop)
    }

    /// Puts a command through a shard, also when that is busy for a while, and returns its log index.
    async fn write(&self, shard: ShardId, command: &Command) -> Result<u64, Error> {
        let deadline = Instant::now() + STEP_TIMEOUT;
        let (_, index) = self.cluster.write_when_free(shard, None, command, deadline).await?;
        Ok(index)
    }

    /// Brings the next entries of an old shard's log into the new ones.
    async fn replay_some(&self, source: &mut Source) -> Result<(), Error> {
        let Some(commands) = source.spool.next().await? else {
            tokio::time::sleep(TAIL_PAUSE).await;
            return Ok(());
        };
        let Some((last, _)) = commands.last() else { return Ok(()) };
        let last = *last;
        let mut parts: BTreeMap<ShardId, Vec<Numbered>> = BTreeMap::new();
        for (index, command) in commands {
            let Some(command) = command.filter(|_| index > source.done) else { continue };
            let envelope: Envelope = codec::decode(&command)?;
            if source.refusals.has_refused(&envelope.command) || was_refused(&self.config, &envelope.command)
            {
                continue;
            }
            for (child, (first, last)) in &self.children {
                let Some(part) = envelope.command.clone().within(*first, *last) else { continue };
                let part = Envelope { command: part, ..envelope.clone() };
                parts.entry(*child).or_default().push((command.len(), (source.base + index, part)));
            }
        }
        let from = source.shard;
        let writes = parts.into_iter().map(|(child, commands)| async move {
            for commands in bounded(commands, usize::MAX, |(bytes, _)| *bytes) {
                let commands = commands.into_iter().map(|(_, command)| command).collect();
                let replay = Replay { by: self.by, from, commands };
                self.write(child, &Command::Replay(Box::new(replay))).await?;
            }
            Ok::<_, Error>(())
        });
        futures::future::try_join_all(writes.collect::<Vec<_>>()).await?;
        source.done = source.done.max(last);
        Ok(())
    }
}

/// A command with the number that it had, and its size in bytes.
type Numbered = (usize, (u64, Envelope));

/// Whether the old shard has refused a command of which the new ones would see a part each, and might take it.
fn was_refused(config: &CollectionConfig, command: &Command) -> bool {
    match command {
        Command::Upsert(points) | Command::StageChunks { points, .. } => {
            points.iter().any(|point| check_point(config, point).is_err())
        }
        _ => false,
    }
}

fn document_bytes(document: &Document) -> usize {
    let error = document.error.as_ref().map_or(0, String::len);
    DOCUMENT_BYTES + document.filename.len() + document.attributes.len() + error
}

/// The next records of a copy, and where the reading has come to with them.
async fn next_batch<T: Send + 'static, C: Send + 'static>(
    copy: &Arc<ScratchCopy>,
    after: C,
    read: impl FnOnce(&Archive, &mut C) -> shoal_engine::Result<Vec<T>> + Send + 'static,
) -> Result<(Vec<T>, C), Error> {
    let copy = copy.clone();
    blocking(move || {
        let mut after = after;
        read(&copy.archive, &mut after).map(|batch| (batch, after))
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> shoal_engine::Result<T> + Send + 'static,
) -> Result<T, Error> {
    Ok(tokio::task::spawn_blocking(work).await.map_err(Error::internal)??)
}
