//! The table of a run on GPUs: ours alone, or with NCCL beside it, or, of a quantised sum, with the plain one.

use unisono::settings::format_size;

use super::gpu_record::{Gpus, OnGpu, Side};
use super::table::{HEADING, WRONG, bandwidth, time};

/// `unisono 0.1.0 · 4 × NVIDIA H200 through device memory · CUDA 13.0 · kernels 0123abcd · NCCL 2.27.3, NVLS off`.
pub(super) fn opening(gpus: &Gpus) -> String {
    let mut kinds: Vec<(&str, usize)> = Vec::new();
    for name in &gpus.devices {
        match kinds.iter_mut().find(|(kind, _)| kind == name) {
            Some((_, count)) => *count += 1,
            None => kinds.push((name, 1)),
        }
    }
    let kinds: Vec<String> = kinds.iter().map(|(name, count)| format!("{count} × {name}")).collect();
    let mut opening = format!(
        "unisono {} · {} through {} · CUDA {} · kernels {}",
        env!("CARGO_PKG_VERSION"),
        kinds.join(" + "),
        gpus.link,
        gpus.driver_cuda,
        gpus.kernels.get(..8).unwrap_or_default(),
    );
    if gpus.ranks > gpus.devices.len() {
        opening += &format!(" · shared by {} ranks", gpus.ranks);
    }
    opening += &format!(" · up to {} SMs · forms from {}", gpus.multiprocessors, gpus.forms_from);
    if let Some(nccl) = &gpus.nccl {
        let nvls = if nccl.may_use_nvls { "NVLS as NCCL chooses" } else { "NVLS off" };
        opening += &format!(" · NCCL {}, {nvls}", nccl.version);
    }
    opening
}

/// The title of an operation, and the names of the columns; `rival` is measured beside it.
pub(super) fn heading(title: &str, rival: Option<&str>) -> String {
    let columns = if let Some(rival) = rival {
        format!(
            "{:>10} {:>10} {:>10} {:>11} {:>11} {:>6} {:>9} {:>9}  {:<14} {:>3} {:>9}  {}",
            "bytes",
            "eager",
            "graph",
            format!("{rival} eager"),
            format!("{rival} graph"),
            "ratio",
            "busbw",
            rival,
            "form × blocks",
            "SMs",
            "submit",
            "ok"
        )
    } else {
        format!(
            "{:>10} {:>10} {:>10} {:>9} {:>9}  {:<14} {:>3} {:>9}  {}",
            "bytes", "eager", "graph", "algbw", "busbw", "form × blocks", "SMs", "submit", "ok"
        )
    };
    format!("{HEADING}{title}{HEADING:#}\n{columns}")
}

/// One size.
pub(super) fn row(measured: &OnGpu, has_rival: bool) -> String {
    let ours = &measured.ours;
    let none = || "–".to_owned();
    let grid = format!("{} × {}", measured.form, measured.blocks);
    let submit = ours.submit_us.map_or_else(none, time);
    let (bytes, eager, graph) = (format_size(measured.bytes), time(ours.eager_us), time(ours.graph_us));
    let (ok, on) = (ok(measured), measured.multiprocessors);
    if !has_rival {
        let (algbw, busbw) = (bandwidth(ours.algbw), bandwidth(ours.busbw));
        return format!(
            "{bytes:>10} {eager:>10} {graph:>10} {algbw:>9} {busbw:>9}  {grid:<14} {on:>3} {submit:>9}  {ok}"
        );
    }
    let rival = |figure: fn(&Side) -> String| measured.rival().map_or_else(none, figure);
    let (its_eager, its_graph) = (rival(|side| time(side.eager_us)), rival(|side| time(side.graph_us)));
    let ratio = measured.ratio().map_or_else(none, |ratio| format!("{ratio:.2}"));
    let (busbw, its_busbw) = (bandwidth(ours.busbw), rival(|side| bandwidth(side.busbw)));
    format!(
        "{bytes:>10} {eager:>10} {graph:>10} {its_eager:>11} {its_graph:>11} {ratio:>6} {busbw:>9} \
         {its_busbw:>9}  {grid:<14} {on:>3} {submit:>9}  {ok}"
    )
}

/// `ok` where all bits are right, `near` where sums are within the rounding errors of their order.
fn ok(measured: &OnGpu) -> String {
    let wrong = |who: &str, side: &Side| format!("{WRONG}{} WRONG{who}{WRONG:#}", side.wrong);
    let whose = if measured.plain.is_some() { " in the plain sum" } else { " in NCCL" };
    match measured.rival() {
        _ if measured.ours.wrong > 0 => wrong("", &measured.ours),
        Some(rival) if rival.wrong > 0 => wrong(whose, rival),
        _ if measured.ours.is_exact => "ok".to_owned(),
        _ => "near".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::gpu_record::NcclFacts;
    use super::*;

    fn side(graph_us: f64) -> Side {
        Side {
            eager_us: 12.5,
            graph_us,
            submit_us: Some(1.234),
            algbw: 10.0,
            busbw: 15.0,
            is_exact: true,
            wrong: 0,
        }
    }

    fn measured(nccl: Option<Side>) -> OnGpu {
        OnGpu {
            operation: "all_reduce".into(),
            bytes: 65_536,
            form: "one-shot".into(),
            blocks: 11,
            threads: 512,
            tile: 0,
            multiprocessors: 6,
            rounds: 5,
            batch: 100,
            ours: side(6.0),
            plain: None,
            nccl,
            nccl_lacks: None,
        }
    }

    fn plain(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    #[test]
    fn columns_stand_below_their_names() {
        for (has_rival, nccl) in [(false, None), (true, None), (true, Some(side(9.0)))] {
            let heading = plain(&heading("x", has_rival.then_some("NCCL")));
            let columns = heading.lines().nth(1).unwrap();
            let row = plain(&row(&measured(nccl), has_rival));
            assert_eq!(columns.chars().count(), row.chars().count(), "{columns}\n{row}");
        }
        let quantised = OnGpu { plain: Some(side(12.0)), ..measured(None) };
        let columns = plain(&heading("x", Some("plain"))).lines().nth(1).unwrap().chars().count();
        let beside = plain(&row(&quantised, true));
        assert!(beside.contains(" 2.00 ") && beside.chars().count() == columns, "{beside}");
        let row = plain(&row(&measured(Some(side(9.0))), true));
        assert!(row.contains(" 1.50 ") && row.contains("one-shot × 11    6 "), "{row}");
    }

    #[test]
    fn what_is_wrong_is_said_and_whose_it_is() {
        let mut row_of = measured(Some(Side { wrong: 3, ..side(9.0) }));
        assert!(plain(&row(&row_of, true)).ends_with("3 WRONG in NCCL"));
        assert!(row_of.is_wrong());
        let quantised = OnGpu { plain: Some(Side { wrong: 4, ..side(9.0) }), ..measured(None) };
        assert!(plain(&row(&quantised, true)).ends_with("4 WRONG in the plain sum"));
        row_of.ours.wrong = 2;
        assert!(plain(&row(&row_of, true)).ends_with("2 WRONG"));
    }

    #[test]
    fn the_opening_counts_devices_and_says_what_nccl_may_do() {
        let nccl = NcclFacts { version: "2.27.3".into(), path: "libnccl.so.2".into(), may_use_nvls: false };
        let gpus = Gpus {
            devices: vec!["NVIDIA H200".into(), "NVIDIA H200".into()],
            ranks: 2,
            link: "device memory".into(),
            forms_from: "tuning file a.tune".into(),
            multiprocessors: 66,
            driver_cuda: "13.0".into(),
            kernels: "0123456789".into(),
            nccl: Some(nccl),
        };
        let opening = opening(&gpus);
        let expected = "2 × NVIDIA H200 through device memory · CUDA 13.0 · kernels 01234567 · up to 66 SMs · forms from tuning file a.tune · NCCL 2.27.3, NVLS off";
        assert!(opening.ends_with(expected), "{opening}");
    }
}
