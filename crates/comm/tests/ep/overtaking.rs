//! A fast rank and a slow one: nobody writes what others still read.

use std::time::Duration;

use unisono::ep::{Buffer, LowLatencyDispatch, Settings};
use unisono::half::bf16;

use super::support::threads::on_threads;

const HIDDEN: usize = 8;

#[test]
fn nobody_overwrites_what_others_still_read() {
    on_threads(2, |rank| {
        let settings = Settings { capacity: 2, top_k: 1, low_latency: true, ..Settings::new(HIDDEN, 2) };
        let mut buffer = Buffer::new(&rank, settings).unwrap();
        buffer.exchange(&rank).unwrap();
        let me = rank.rank();
        // Each sends to the other. Rank 0 sends ahead as far as it may; rank 1 looks at each call late.
        let value = |from: usize, call: usize| bf16::from_f32((call * 2 + from) as f32);
        for pair in 0..6 {
            let calls = [2 * pair, 2 * pair + 1];
            let sent = calls.map(|call| {
                let (x, other) = (vec![value(me, call); HIDDEN], [1 - me as i64]);
                buffer.low_latency_dispatch_send(&LowLatencyDispatch::new(&x, &other, 1)).unwrap()
            });
            for (call, sent) in calls.into_iter().zip(sent) {
                if me == 1 {
                    std::thread::sleep(Duration::from_millis(10));
                }
                let got = buffer.receive_dispatch(sent).unwrap();
                assert_eq!(got.counts.as_slice::<i32>().unwrap(), [1]);
                assert_eq!(got.x.as_slice::<bf16>().unwrap()[..HIDDEN], [value(1 - me, call); HIDDEN]);
            }
        }
        buffer.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}
