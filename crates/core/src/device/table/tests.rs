//! Tables as text, and what the built-in one decides: expectations that were written by hand from the measurements.

use super::super::layout::Link;
use super::super::multiprocessors::{LEAST_MULTIPROCESSORS, blocks_on};
use super::super::select::{Form, Launch, Question, Rules};
use super::*;
use crate::reduce_op::ReduceOp;
use crate::settings::Order;

fn rules(ranks: usize) -> Rules {
    Rules {
        ranks,
        link: Link::Device,
        crowd: 1,
        order: Order::Fixed,
        bulk_copies: true,
        // As the first communicator on an H200 has them.
        most_blocks: 130,
        engines: false,
        forced: None,
        table: Table::built_in(ranks),
    }
}

fn question(bytes: usize) -> Question {
    Question { kind: Kind::AllReduce { op: ReduceOp::Sum }, bytes, size: 2, is_reachable: false }
}

fn read(text: &str) -> Result<BTreeMap<usize, Table>, String> {
    let mut tables = Tables::default();
    text.lines().try_for_each(|line| tables.add(line))?;
    tables.finish()
}

#[test]
fn tables_read_as_they_are_written_and_the_built_in_one_has_every_world() {
    for ranks in 2..=MAX_RANKS {
        let table = Table::built_in(ranks);
        let text = table.to_text(ranks);
        assert_eq!(read(&text), Ok(BTreeMap::from([(ranks, table)])));
        assert!(include_str!("../default.tune").contains(&text), "{ranks}");
    }
    assert_eq!(Table::built_in(1), Table::built_in(2));
    assert_eq!(Table::built_in(1000), Table::built_in(MAX_RANKS));
    for (at, kind) in DIRECT_FORMS.into_iter().enumerate() {
        assert_eq!(index(kind), at, "{kind:?}");
    }
}

#[test]
fn what_is_wrong_in_a_line_is_said() {
    let good = Table::built_in(4).to_text(4);
    for (from, to, expected) in [
        ("gpus=4 all_reduce", "gpus=1 all_reduce", "gpus= with a number from 2 to 16"),
        ("gpus=4 all_reduce", "gpus=+4 all_reduce", "gpus= with a number from 2 to 16"),
        ("gpus=4 gather", "gpus=4 barrier", "one of all_reduce, broadcast, all_gather, reduce, "),
        ("gpus=4 gather", "gpus=4 scatter", "one line for scatter of gpus=4"),
        ("one_shot_to=262144", "one_shot_to=256KiB", "one_shot_to= with a number of bytes or `never`"),
        ("one_shot_to=262144", "two_shot_to=262144", "one_shot_to= with a number of bytes or `never`"),
        ("packet_blocks=64", "packet_blocks=65", "packet_blocks= with a number from 1 to 64"),
        ("packet_blocks=64", "packet_blocks=never", "packet_blocks= with a number from 1 to 64"),
        ("ring_blocks=128", "ring_blocks=0", "ring_blocks= with a number from 1 to 160"),
        ("ring_blocks=128", "ring_blocks=128 and=1", "nothing after the last number"),
        ("ring_blocks=128", "", "ring_blocks= with a number from 1 to 160"),
    ] {
        let error = read(&good.replacen(from, to, 1)).unwrap_err();
        assert!(error.starts_with(expected), "{to}: {error}");
    }
    let without: Vec<&str> = good.lines().filter(|line| !line.contains("scatter")).collect();
    assert_eq!(read(&without.join("\n")), Err("a line gpus=4 reduce_scatter".to_owned()));
}

const KINDS: [Kind; 8] = DIRECT_FORMS;

/// Up to which size an operation is one-shot, then two-shot, and from where on it goes in a ring, if at all. The one-shot of an
/// all-gather and a reduce among many ranks ends where packets of 16-bit elements have no more room.
fn borders(kind: Kind, ranks: usize) -> (usize, usize, Option<usize>) {
    const ONE_SHOT: [usize; 15] = [
        524_288, 393_216, 262_144, 196_608, 157_286, 131_072, 112_347, 98_304, 87_381, 78_643, 71_493,
        65_536, 60_494, 56_173, 52_428,
    ];
    const ONE_SHOT_OF_PARTS: [usize; 15] = [
        1_048_576, 1_048_576, 1_048_576, 524_288, 524_288, 524_288, 524_288, 524_280, 471_852, 428_952,
        393_216, 362_964, 337_032, 314_568, 294_912,
    ];
    const REDUCE_SCATTER_RING: [usize; 15] = [
        2_097_152, 22_369_621, 4_194_304, 13_421_772, 11_184_810, 9_586_980, 8_388_608, 7_456_540, 6_710_886,
        6_100_805, 5_592_405, 5_162_220, 4_793_490, 4_473_924, 4_194_304,
    ];
    const TWO_SHOT: usize = 2_097_152;
    const PAIR: usize = 2_097_152;
    let at = ranks - 2;
    match kind {
        Kind::AllReduce { .. } if ranks == 8 => (ONE_SHOT[at], TWO_SHOT, Some(67_108_864)),
        Kind::Broadcast { .. } if ranks == 8 => (ONE_SHOT[at], TWO_SHOT, Some(16_777_216)),
        Kind::AllGather if ranks == 8 => (524_288, 0, Some(1_048_576)),
        Kind::Reduce { .. } if ranks == 8 => (524_288, 0, Some(16_777_216)),
        Kind::Scatter { .. } if ranks == 8 => (262_143, 0, None),
        Kind::Gather { .. } | Kind::AllToAll if ranks == 8 => (524_287, 0, None),
        Kind::AllReduce { .. } if ranks == 4 => (ONE_SHOT[at], TWO_SHOT, Some(16_777_216)),
        Kind::Broadcast { .. } if ranks == 4 => (ONE_SHOT[at], TWO_SHOT, Some(524_288)),
        Kind::Reduce { .. } if ranks == 4 => (1_048_576, 0, Some(524_288)),
        Kind::AllReduce { .. } => {
            (ONE_SHOT[at], TWO_SHOT, Some([PAIR, 16_777_216, 16_777_216, 100_663_296][at.min(3)]))
        }
        Kind::Broadcast { .. } => {
            (ONE_SHOT[at], TWO_SHOT, Some(if ranks <= 4 { 2_097_152 } else { 4_194_304 }))
        }
        Kind::AllGather => {
            (ONE_SHOT_OF_PARTS[at], 0, Some([PAIR, 8_388_608, 2_424_833, 8_388_608][at.min(3)]))
        }
        Kind::Reduce { .. } => {
            (ONE_SHOT_OF_PARTS[at], 0, Some(if ranks <= 4 { 2_097_152 } else { 4_194_304 }))
        }
        Kind::ReduceScatter { .. } => (ONE_SHOT_OF_PARTS[at], 0, Some(REDUCE_SCATTER_RING[at])),
        Kind::Scatter { .. } => (ONE_SHOT_OF_PARTS[at].min(524_288), 0, None),
        _ => (ONE_SHOT_OF_PARTS[at], 0, None),
    }
}

/// From where on it goes in a ring where there are few blocks.
fn narrow_ring(kind: Kind, ranks: usize) -> Option<usize> {
    match kind {
        Kind::AllReduce { .. } | Kind::ReduceScatter { .. } if ranks == 8 => Some(33_554_432),
        Kind::Broadcast { .. } if ranks == 8 => Some(2_097_152),
        Kind::Reduce { .. } if ranks == 8 => Some(4_194_304),
        Kind::AllGather | Kind::Reduce { .. } if ranks == 4 => Some(2_097_152),
        Kind::ReduceScatter { .. } if ranks == 4 => None,
        Kind::AllReduce { .. } if ranks > 2 => None,
        _ => borders(kind, ranks).2,
    }
}

/// From which size on an operation goes in lines, one-shot and then two-shot up to which, where data can travel so. Measured among two,
/// four and eight; else calculated from what a link moves and what a hop takes; one-shot parts end where lines have no more room.
fn lines(kind: Kind, ranks: usize) -> (usize, usize, usize) {
    if ranks == 2 {
        let (one_shot, two_shot) = match kind {
            Kind::AllReduce { .. } => (384 << 10, 8 << 20),
            Kind::Broadcast { .. } => (2560 << 10, 0),
            Kind::AllGather => (3 << 20, 0),
            _ => (7 << 20, 0),
        };
        return ((128 << 10) + 1, one_shot, two_shot);
    }
    match kind {
        Kind::AllReduce { .. } if ranks == 4 => return ((64 << 10) + 1, 288 << 10, 8 << 20),
        Kind::Broadcast { .. } if ranks == 4 => return ((48 << 10) + 1, 384 << 10, 4 << 20),
        Kind::AllGather | Kind::Gather { .. } if ranks == 4 => {
            return ((48 << 10) + 1, 2_424_832, 0);
        }
        Kind::Reduce { .. } if ranks == 4 => return ((48 << 10) + 1, 896 << 10, 4 << 20),
        Kind::Scatter { .. } if ranks == 4 => return ((256 << 10) + 1, 2_424_832, 0),
        Kind::AllToAll if ranks == 4 => return ((96 << 10) + 1, 2_424_832, 0),
        Kind::AllReduce { .. } | Kind::Broadcast { .. } if ranks == 8 => {
            return ((64 << 10) + 1, 256 << 10, 8 << 20);
        }
        Kind::ReduceScatter { .. } if ranks == 8 => return (256 << 10, (1 << 20) - 1, 0),
        Kind::Scatter { .. } | Kind::AllToAll if ranks == 8 => return (112_348, (512 << 10) - 1, 0),
        _ => {}
    }
    let parts = 112 / (ranks - 1) * 65_536;
    let few = (768 << 10) / (ranks - 1);
    let many = few.clamp(256 << 10, 512 << 10);
    const ONE_SHOT: [usize; 4] = [1_835_008, 786_432, 524_288, 393_216];
    let one_shot = ONE_SHOT.get(ranks - 3).copied().unwrap_or(262_144);
    match (kind, ranks) {
        (Kind::AllReduce { .. }, 3..=8) => (many + 1, one_shot, 8 << 20),
        (Kind::AllReduce { .. }, _) => (many + 1, one_shot, 7 << 20),
        (Kind::Broadcast { .. }, _) => (many + 1, one_shot, 4 << 20),
        (Kind::Scatter { .. }, _) => (few + 1, parts.min(1 << 20), 0),
        (Kind::Reduce { .. }, _) => {
            const ONE_SHOT: [usize; 6] = [1792 << 10, 0, 480 << 10, 352 << 10, 272 << 10, 256 << 10];
            (
                few + 1,
                ONE_SHOT.get(ranks - 3).copied().unwrap_or(192 << 10),
                if ranks <= 8 { 4 << 20 } else { 3584 << 10 },
            )
        }
        _ => (few + 1, parts, 0),
    }
}

/// 1 B to 4 GiB: powers of two, what lies between them, and both sides of every border.
fn sizes(kind: Kind, ranks: usize) -> Vec<usize> {
    let (one, two, ring) = borders(kind, ranks);
    let (lines, one_line, two_lines) = lines(kind, ranks);
    let rings = [ring, narrow_ring(kind, ranks)].map(|from| from.unwrap_or(0));
    let borders = [one, two, rings[0], rings[1], lines, one_line, two_lines];
    let around = borders.into_iter().flat_map(|at| [at, at + 1, at.max(2) - 1]);
    let powers = (0..=32).flat_map(|shift| [1usize << shift, (1 << shift) + 1, (3 << shift) / 2]);
    powers.chain(around).filter(|bytes| (1..=4 << 30).contains(bytes)).collect()
}

#[test]
fn without_a_tuning_file_forms_change_where_they_were_measured_to() {
    for ranks in 2..=MAX_RANKS {
        for kind in KINDS {
            let (one, two, ring) = borders(kind, ranks);
            for bytes in sizes(kind, ranks) {
                let question = Question { kind, ..question(bytes) };
                let packets = match bytes {
                    bytes if bytes <= one => Some(Form::OneShot),
                    bytes if bytes <= two => Some(Form::TwoShot),
                    _ => None,
                };
                let (from, one_line, two_lines) = lines(kind, ranks);
                let in_lines = match bytes {
                    bytes if bytes < from => None,
                    bytes if bytes <= one_line => Some(Form::OneShotLines),
                    bytes if bytes <= two_lines => Some(Form::TwoShotLines),
                    _ => None,
                };
                let rings = |ring: Option<usize>| {
                    let is_ring = ring.is_some_and(|from| bytes >= from);
                    let tiled = if is_ring { Form::Ring } else { Form::Bulk };
                    in_lines.or(packets).unwrap_or(tiled)
                };
                let form = |rules: Rules| rules.decide(&question).form;
                let what = format!("{} of {bytes} bytes among {ranks}", kind.name());
                assert_eq!(form(rules(ranks)), rings(ring), "{what}");
                let few = narrow_ring(kind, ranks);
                assert_eq!(form(Rules { most_blocks: 24, ..rules(ranks) }), rings(few), "{what}, narrow");
                let keeps_order = kind.op().is_none() || ranks == 2;
                assert_eq!(
                    form(Rules { order: Order::Rank, ..rules(ranks) }),
                    rings(ring.filter(|_| keeps_order)),
                    "{what}"
                );
                let reaches = Question { is_reachable: true, ..question };
                let is_direct =
                    matches!(kind, Kind::AllReduce { .. } | Kind::Broadcast { .. } | Kind::AllGather);
                // From a round size on, and where packets end a little below for lack of room.
                let direct_from = match kind {
                    Kind::AllGather if ranks <= 4 => 1_048_577,
                    Kind::AllGather => 524_289,
                    _ if ranks == 4 || ranks == 8 => usize::MAX,
                    _ => 2_097_153,
                };
                let staged = in_lines.or(packets).filter(|_| bytes < direct_from);
                let is_direct = is_direct && direct_from < usize::MAX;
                let expected = if is_direct { staged.unwrap_or(Form::Direct) } else { rings(ring) };
                assert_eq!(rules(ranks).decide(&reaches).form, expected, "{what}, in windows");
                // Where lines are not whole, nothing takes them.
                let older = Rules { bulk_copies: false, ..rules(ranks) };
                assert!(!form(older).is_lines(), "{what}");
            }
        }
    }
}

#[test]
fn without_a_tuning_file_grids_are_those_that_were_measured() {
    let all_reduce = KINDS[0];
    let wide = rules;
    let by_threads = |ranks| Rules { bulk_copies: false, ..wide(ranks) };
    let narrow = |ranks| Rules { most_blocks: 24, ..rules(ranks) };
    for (rules, kind, bytes, expected) in [
        (wide(4), all_reduce, 96, (Form::OneShot, 1, 128, 0, false)),
        (wide(4), all_reduce, 8 << 10, (Form::OneShot, 6, 128, 0, false)),
        (wide(4), all_reduce, 64 << 10, (Form::OneShot, 43, 128, 0, false)),
        (by_threads(4), all_reduce, 256 << 10, (Form::OneShot, 64, 352, 0, false)),
        (wide(4), all_reduce, 256 << 10, (Form::OneShotLines, 64, 288, 0, false)),
        (wide(4), all_reduce, 512 << 10, (Form::TwoShotLines, 64, 160, 0, false)),
        (by_threads(4), all_reduce, 1 << 20, (Form::TwoShot, 64, 352, 0, false)),
        (wide(4), all_reduce, 1 << 20, (Form::TwoShotLines, 64, 288, 0, false)),
        (wide(4), all_reduce, 4 << 20, (Form::TwoShotLines, 64, 512, 0, false)),
        (wide(4), all_reduce, (8 << 20) + 1, (Form::Bulk, 120, 512, 1632, false)),
        (wide(4), all_reduce, 64 << 20, (Form::Ring, 128, 512, 4096, false)),
        (wide(4), Kind::AllGather, 2 << 20, (Form::OneShotLines, 64, 512, 0, false)),
        (wide(4), Kind::AllGather, 4 << 20, (Form::Ring, 128, 512, 2048, false)),
        (by_threads(4), Kind::Scatter { root: 0 }, 1 << 20, (Form::Bulk, 128, 512, 4096, false)),
        (wide(4), Kind::Scatter { root: 0 }, 16 << 20, (Form::Bulk, 128, 512, 1600, true)),
        (wide(4), Kind::AllToAll, 128 << 20, (Form::Bulk, 128, 512, 1600, true)),
        (by_threads(4), all_reduce, 4 << 20, (Form::Bulk, 120, 512, 1632, false)),
        (by_threads(4), all_reduce, 64 << 20, (Form::Ring, 128, 512, 4096, false)),
        (narrow(4), all_reduce, 64 << 20, (Form::Bulk, 24, 1024, 1600, true)),
        (narrow(4), Kind::Broadcast { root: 0 }, 64 << 20, (Form::Ring, 24, 1024, 2400, true)),
        (narrow(4), all_reduce, 256 << 10, (Form::OneShotLines, 24, 512, 0, false)),
    ] {
        let launch = rules.decide(&Question { kind, ..question(bytes) });
        let got = (launch.form, launch.blocks, launch.threads, launch.tile, launch.by_copies);
        assert_eq!(got, expected, "{} of {bytes} bytes, {} blocks at most", kind.name(), rules.most_blocks);
    }
    let reaches = Question { is_reachable: true, ..question(64 << 20) };
    let direct = wide(2).decide(&reaches);
    assert_eq!((direct.form, direct.blocks, direct.threads), (Form::Direct, 64, 512));
}

#[test]
fn a_table_decides() {
    let mut rules = rules(4);
    *rules.table.row_mut(KINDS[0]) = Row {
        one_shot_to: 99,
        two_shot_to: 1 << 20,
        lines_from: usize::MAX,
        one_shot_lines_to: 300_000,
        two_shot_lines_to: 5 << 20,
        direct_from: 64 << 20,
        ring_from: 32 << 20,
        narrow_ring_from: usize::MAX,
        engine_from: usize::MAX,
        packet_blocks: 5,
        direct_blocks: 7,
        threads_to: 2 << 20,
        thread_blocks: 90,
        bulk_blocks: 30,
        bulk_tile: 104,
        ring_blocks: 40,
    };
    let taken = |rules: &Rules, bytes, is_reachable| {
        let launch = rules.decide(&Question { is_reachable, ..question(bytes) });
        (launch.form, launch.blocks, launch.tile)
    };
    assert_eq!(taken(&rules, 99, false), (Form::OneShot, 1, 0));
    assert_eq!(taken(&rules, 100, false), (Form::TwoShot, 1, 0));
    assert_eq!(taken(&rules, 1 << 20, true), (Form::TwoShot, 5, 0));
    assert_eq!(taken(&rules, 2 << 20, false), (Form::Bulk, 90, 1096));
    assert_eq!(taken(&rules, 4 << 20, false), (Form::Bulk, 30, 208));
    assert_eq!(taken(&rules, 32 << 20, false), (Form::Ring, 40, 2400));
    assert_eq!(taken(&rules, 4 << 20, true).0, Form::Bulk);
    assert_eq!(taken(&rules, 64 << 20, true), (Form::Direct, 7, 0));
    // Lines take what lies between their borders.
    rules.table.row_mut(KINDS[0]).lines_from = 90;
    assert_eq!(taken(&rules, 89, false), (Form::OneShot, 1, 0));
    assert_eq!(taken(&rules, 90, false), (Form::OneShotLines, 1, 0));
    assert_eq!(taken(&rules, 300_000, true), (Form::OneShotLines, 5, 0));
    assert_eq!(taken(&rules, 300_001, false), (Form::TwoShotLines, 5, 0));
    assert_eq!(taken(&rules, (5 << 20) + 1, false).0, Form::Bulk);
    rules.table.row_mut(KINDS[0]).lines_from = usize::MAX;
    // Where packets would be taken, but have no room, direct is.
    rules.table.row_mut(KINDS[0]).two_shot_to = 16 << 20;
    assert_eq!(taken(&rules, 16 << 20, true).0, Form::Direct);
    assert_eq!(taken(&rules, 16 << 20, false).0, Form::Bulk);
    rules.table.row_mut(KINDS[0]).direct_from = usize::MAX;
    assert_eq!(taken(&rules, 64 << 20, true).0, Form::Ring);
    rules.most_blocks = 24;
    assert_eq!(taken(&rules, 64 << 20, true).0, Form::Bulk);
    // Nobody else's row has changed.
    assert_eq!(rules.decide(&Question { kind: Kind::AllGather, ..question(99) }).form, Form::OneShot);
}

#[test]
fn a_cap_on_multiprocessors_holds_for_every_form() {
    assert_eq!([9, 16, 32, 33, 66].map(blocks_on), [8, 15, 31, 64, 130]);
    for cap in LEAST_MULTIPROCESSORS..=80 {
        for (link, bulk_copies) in [(Link::Device, true), (Link::Device, false), (Link::Host, false)] {
            for ranks in [2, 4, 8, 16] {
                let most_blocks = blocks_on(cap).min(MAX_BLOCKS as u32);
                let rules = Rules { link, bulk_copies, most_blocks, ..rules(ranks) };
                assert_eq!(rules.multiprocessors(), cap);
                for kind in KINDS {
                    for bytes in sizes(kind, ranks) {
                        for is_reachable in [false, true] {
                            let launch = rules.decide(&Question { kind, is_reachable, ..question(bytes) });
                            assert!(launch.multiprocessors() <= cap, "{cap}: {launch:?}");
                        }
                    }
                }
                for rows in [1, 100, 10_000] {
                    let launch = rules.decide_rows(rows, 64);
                    assert!(launch.is_none_or(|launch| launch.multiprocessors() <= cap), "{launch:?}");
                }
            }
        }
    }
    let launch =
        |blocks, threads, by_copies| Launch { form: Form::Bulk, blocks, threads, tile: 8, by_copies };
    assert_eq!(launch(1, 256, false).multiprocessors(), 1);
    assert_eq!(launch(128, 512, false).multiprocessors(), 65);
    assert_eq!(launch(63, 1024, true).multiprocessors(), 64);
}
