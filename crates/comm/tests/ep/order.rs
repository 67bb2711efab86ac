//! Sums are in the order of ranks: with numbers for which any other order gives another sum.

use unisono::DType;
use unisono::ep::{Buffer, Combine, Dispatch, LowLatencyCombine, LowLatencyDispatch, Settings};

use super::support::threads::on_threads;

const HIDDEN: usize = 8;
/// In f32, 10⁸ + 1 is 10⁸: so ((10⁸ + 1) − 10⁸) + 1 is 1, and from the last to the first it is 0.
const OF_RANKS: [f32; 4] = [1e8, 1.0, -1e8, 1.0];

#[test]
fn results_are_added_from_the_first_rank_to_the_last() {
    on_threads(4, |rank| {
        let settings =
            Settings { dtype: DType::F32, capacity: 2, low_latency: true, ..Settings::new(HIDDEN, 4) };
        let mut buffer = Buffer::new(&rank, settings).unwrap();
        buffer.exchange(&rank).unwrap();
        // The order of selections is another one.
        let (x, all) = (vec![0f32; HIDDEN], [3, 1, 0, 2]);
        let sent = buffer.dispatch(&Dispatch::new(&x).top_k(&all, 4)).unwrap();
        let results = vec![OF_RANKS[rank.rank()]; sent.x.len()];
        let combine = Combine::new(&results, &sent.handle);
        assert_eq!(buffer.combine(&combine).unwrap().x.as_slice::<f32>().unwrap(), [1.0; HIDDEN]);
        let ones = vec![1f32; HIDDEN];
        let combined = buffer.combine(&combine.bias(&ones)).unwrap();
        assert_eq!(combined.x.as_slice::<f32>().unwrap(), [2.0; HIDDEN]);
        let sent = buffer.low_latency_dispatch(&LowLatencyDispatch::new(&x, &all, 4)).unwrap();
        let results = vec![OF_RANKS[rank.rank()]; sent.x.len()];
        let combine = LowLatencyCombine::new(&results, &all, &[1.0; 4], &sent.handle);
        let combined = buffer.low_latency_combine(&combine).unwrap();
        assert_eq!(combined.x.as_slice::<f32>().unwrap(), [1.0; HIDDEN]);
        buffer.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn selections_of_one_rank_are_added_in_their_order_first() {
    on_threads(2, |rank| {
        let settings =
            Settings { dtype: DType::F32, capacity: 1, low_latency: true, ..Settings::new(HIDDEN, 8) };
        let mut buffer = Buffer::new(&rank, settings).unwrap();
        buffer.exchange(&rank).unwrap();
        let (x, all) = (vec![0f32; HIDDEN], [2, 0, 3, 1]);
        let sent = buffer.low_latency_dispatch(&LowLatencyDispatch::new(&x, &all, 4)).unwrap();
        // Slot k has the k-th of the numbers, as a weight.
        let results = vec![1f32; sent.x.len()];
        let combine = LowLatencyCombine::new(&results, &all, &OF_RANKS, &sent.handle);
        let combined = buffer.low_latency_combine(&combine).unwrap();
        assert_eq!(combined.x.as_slice::<f32>().unwrap(), [1.0; HIDDEN]);
        buffer.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}
