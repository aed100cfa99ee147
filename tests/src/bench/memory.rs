//! Memory of a node for each point, next to what the vectors and their graph need at least.

use anyhow::Result;
use serde_json::json;

use super::data::Vectors;
use super::loaded::Loaded;
use super::process;
use super::report::{Report, Row};

/// Bytes of one coordinate in the graph (f16).
const COORDINATE_BYTES: usize = 2;
/// An estimate of one vertex of usearch's graph at M = 16, in bytes: key and level (10), 32 links
/// and their count in the base layer (132), and one vertex in 16 has 16 links more (68 / 15).
const VERTEX_BYTES: f64 = 10.0 + 132.0 + 68.0 / 15.0;

/// Reads how much the loaded node has grown.
///
/// # Errors
/// When the node does not run.
pub(super) fn run(loaded: &Loaded, vectors: &Vectors, report: &mut Report) -> Result<()> {
    let resident = process::memory_bytes(loaded.node(), "VmRSS")?;
    let anonymous = process::memory_bytes(loaded.node(), "RssAnon")?;
    let baseline = loaded.baseline_bytes();
    let per_point = resident.saturating_sub(baseline) as f64 / vectors.len() as f64;
    let vector = (vectors.dimension() * COORDINATE_BYTES) as f64;
    let least = vector + VERTEX_BYTES;
    let note = format!(
        "vs {vector:.0} of f16 vector + {VERTEX_BYTES:.0} of graph (estimated); \
         resident {} MiB, {} MiB before the first point",
        resident >> 20,
        baseline >> 20
    );
    let row = Row::new("memory of a node, each point", format!("{per_point:.0} bytes"));
    report.row(row.goal("≤ 1.25 × vector and graph").ratio(per_point / least).note(note));
    let numbers = json!({
        "points": vectors.len(),
        "resident_bytes": resident,
        "anonymous_bytes": anonymous,
        "baseline_bytes": baseline,
        "bytes_per_point": per_point,
        "vector_bytes": vector,
        "vertex_bytes": VERTEX_BYTES,
    });
    report.raw("memory", "node", numbers);
    Ok(())
}
