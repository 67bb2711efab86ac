//! `unisono why`: a paragraph for each communicator that says who waits for whom.

use clap::Args;
use serde::Serialize;
use unisono::recorder;

use super::state::RankState;
use super::{MAX_COLUMNS, Seen, Selection, heading, print, terminal, wrap};
use crate::{Common, Failure};

/// The arguments of `unisono why`.
#[derive(Debug, Args)]
#[command(after_help = "For example: unisono why; unisono why 4121; unisono why run-1f2e3d4c5b6a7988\n\n\
                  Exit code: 0, 1 if there is no job to look at.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    selection: Selection,
}

#[derive(Debug, Serialize)]
struct Explained<'s> {
    job: &'s str,
    generation: u32,
    host: &'s str,
    world_size: usize,
    why: String,
    ranks: Vec<RankState>,
}

/// Says why, and answers the exit code.
pub(crate) fn execute(arguments: &Arguments, common: &Common) -> Result<u8, Failure> {
    let seen = arguments.selection.look()?;
    if let Some(target) = &common.json {
        let explained: Vec<Explained<'_>> = seen.iter().map(explain).collect();
        target.write(&explained)?;
        return Ok(0);
    }
    let columns = terminal().map(|(columns, _)| columns.min(MAX_COLUMNS));
    for (index, Seen { snapshot, .. }) in seen.iter().enumerate() {
        let paragraph = recorder::why(snapshot);
        let paragraph = columns.map_or(paragraph.clone(), |columns| wrap(&paragraph, columns));
        let blank = if index > 0 { "\n" } else { "" };
        print(&format!("{blank}{}\n{paragraph}", heading(snapshot)));
    }
    Ok(0)
}

fn explain(Seen { snapshot, .. }: &Seen) -> Explained<'_> {
    Explained {
        job: &snapshot.job,
        generation: snapshot.generation,
        host: &snapshot.host,
        world_size: snapshot.ranks.len(),
        why: recorder::why(snapshot),
        ranks: RankState::all(snapshot),
    }
}
