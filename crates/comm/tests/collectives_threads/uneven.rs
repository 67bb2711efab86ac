//! Collectives with parts of any size, and on several buffers of each rank: what is refused, and ranks that disagree.

use unisono::{BufMut, Counts, Error, Operations, ReduceOp};

use crate::support::threads::on_threads;

/// The argument that is complained about.
fn complaint(result: unisono::Result<()>) -> (&'static str, String, String) {
    match result.unwrap_err() {
        Error::Argument { what, expected, got, .. } => (what, expected, got),
        error => panic!("{error}"),
    }
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_written() {
    on_threads(2, |rank| {
        let (me, mine, mut all) = (rank.rank(), [1u32; 3], [7u32; 8]);
        let fits: [usize; 2] = [[3, 4], [4, 3]][me];
        let (what, _, got) = complaint(rank.all_gather_v(&mine, &mut all, &[3, 3, 2]));
        assert_eq!((what, got.as_str()), ("parts of the output", "3"));
        let (what, expected, got) = complaint(rank.all_gather_v(&mine, &mut all, &[3, 6]));
        assert_eq!((what, expected.as_str()), ("parts of the output", "within 8 elements"));
        assert_eq!(got, "6 from 3 for rank 1");
        let (_, _, got) = complaint(rank.all_gather_v(&mine, &mut all, &[usize::MAX, 3]));
        assert!(got.contains("for rank 0"), "{got}");
        let overlapping = Counts { counts: &fits, offsets: Some(&[2, 1]) };
        let (what, expected, got) = complaint(rank.all_gather_v(&mine, &mut all, overlapping));
        assert_eq!((what, expected.as_str()), ("parts of the output", "disjoint ones"));
        assert_eq!(got, "two that overlap at element 2");
        let (what, expected, got) = complaint(rank.all_gather_v(&mine, &mut all, &[2, 2]));
        assert_eq!((what, expected.as_str(), got.as_str()), ("count of the input", "2", "3"));
        let (what, expected, got) = complaint(rank.gather_v(&mine, &mut all, &fits, 2));
        assert_eq!((what, expected.as_str(), got.as_str()), ("root", "below 2", "2"));
        let (what, ..) = complaint(rank.all_to_all_v(&all.clone(), &[1, 8], &mut all, &[1, 1]));
        assert_eq!(what, "parts of the input");
        let (what, ..) = complaint(rank.all_reduce_multi(Vec::<BufMut<'_, u32>>::new(), ReduceOp::Sum));
        assert_eq!(what, "number of buffers");
        let (mut short, mut long) = ([0u32; 3], [0u32; 4]);
        let both = vec![BufMut::from(&mut short), BufMut::from(&mut long)];
        let (what, expected, got) = complaint(rank.broadcast_multi(both, 0, 0));
        assert_eq!(
            (what, expected.as_str(), got.as_str()),
            ("count", "3 of u32 in every buffer", "4 of u32 in buffer 1")
        );
        if me == 0 {
            let (what, expected, got) = complaint(rank.broadcast_multi(vec![BufMut::from(&mut short)], 0, 1));
            assert_eq!((what, expected.as_str(), got.as_str()), ("root buffer", "below 1", "1"));
        }
        assert_eq!(all, [7; 8]);
        // Nothing was sent: both still make their first call.
        rank.barrier().unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn ranks_that_disagree_about_sizes_are_told_both() {
    let errors = on_threads(2, |rank| {
        let me = rank.rank();
        let (source, mut target) = ([1u8; 10], [0u8; 10]);
        let (out, into) = [([1, 2], [1, 4]), ([3, 1], [2, 1])][me];
        rank.all_to_all_v(&source, &out, &mut target, &into)
            .and_then(|()| rank.barrier())
            .unwrap_err()
            .to_string()
    });
    for error in errors {
        assert!(error.contains("4 from rank 1") && error.contains("3 to rank 0"), "{error}");
    }
    let errors = on_threads(2, |rank| {
        let mine = vec![0u8; 2 + rank.rank()];
        let counts = [[2, 3], [3, 3]][rank.rank()];
        rank.all_gather_v(&mine, &mut vec![0u8; 6], &counts).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("all_gather_v #1 on rank 0 (u8, 5 in parts #"), "{error}");
        assert!(error.contains("all_gather_v #1 on rank 1 (u8, 6 in parts #"), "{error}");
    }
    let errors = on_threads(2, |rank| {
        let (mut a, mut b) = ([0u8; 2], [0u8; 2]);
        let mut both = vec![BufMut::from(&mut a), BufMut::from(&mut b)];
        both.truncate(1 + rank.rank());
        rank.all_reduce_multi(both, ReduceOp::Max).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("max, 1 buffer)") && error.contains("max, 2 buffers"), "{error}");
    }
}
