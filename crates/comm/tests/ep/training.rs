//! The example that trains a mixture of experts: it learns, and alike on any number of ranks.

use super::moe_training::train;
use super::support::threads::on_threads;

#[test]
fn a_mixture_of_experts_learns_alike_on_any_number_of_ranks() {
    let losses = |ranks| {
        let of_all = on_threads(ranks, |rank| {
            let losses = train(&rank, 40).unwrap();
            rank.destroy().unwrap();
            losses
        });
        assert!(of_all.iter().all(|losses| *losses == of_all[0]), "ranks differ");
        of_all[0].clone()
    };
    let alone = losses(1);
    assert!(alone[39] < alone[0] * 0.5, "{alone:?}");
    for ranks in [2, 4, 16] {
        for (got, expected) in losses(ranks).iter().zip(&alone) {
            assert!((got - expected).abs() < 1e-3 * expected, "{ranks} ranks: {got} for {expected}");
        }
    }
}
