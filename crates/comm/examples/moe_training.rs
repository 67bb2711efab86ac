//! Trains a small mixture of experts, with the experts spread over the ranks.
//!
//! ```text
//! cargo run --release -p unisono --example moe_training                               # four threads
//! unisono run -n 8 -- target/release/examples/moe_training                            # eight processes
//! ```
//! A router gives each token two of 16 experts, which are matrices; the result is their weighted sum. The router and a bias are the same on all
//! ranks, each expert lives on one. Forward: dispatch, the experts, combine. Backward: the gradients of results go the way of the tokens (a
//! cached dispatch), those of tokens and of weights come back (a combine).

#![allow(clippy::print_stdout, dead_code)] // a program that people run; a test trains, too

use unisono::ep::{Buffer, CachedDispatch, Combine, Dispatch, Dispatched, Settings};
use unisono::{Communicator, DType, Error, Operations, ReduceOp, Result};

const HIDDEN: usize = 16;
const EXPERTS: usize = 16;
const TOP_K: usize = 2;
/// Tokens of all ranks in a step.
const TOKENS: usize = 512;
const RATE: f32 = 0.4;

fn main() -> Result<()> {
    let train = |communicator: Communicator| -> Result<()> {
        let losses = train(&communicator, 120)?;
        if communicator.rank() == 0 {
            for (step, loss) in losses.iter().enumerate().step_by(20) {
                println!("step {step:>4}: loss {loss:.4}");
            }
            println!("     at last: loss {:.4}", losses[losses.len() - 1]);
        }
        communicator.destroy()
    };
    let ranks = match Communicator::from_env() {
        Err(Error::LaunchNothing) => Communicator::threads(4)?,
        communicator => return train(communicator?),
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(|| train(rank))).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// What is learned. Matrices are row-major.
struct Model {
    /// Added to each token: hidden. The same on all ranks.
    bias: Vec<f32>,
    /// experts × hidden. The same on all ranks.
    router: Vec<f32>,
    /// A hidden × hidden for each expert of this rank.
    experts: Vec<Vec<f32>>,
}

/// Where the tokens of a step go.
struct Routed {
    /// tokens × 2.
    experts: Vec<i64>,
    /// tokens × 2.
    weights: Vec<f32>,
}

/// Trains for some steps; the mean loss of each. Every rank calls it.
pub(crate) fn train(communicator: &Communicator, steps: usize) -> Result<Vec<f32>> {
    let settings = Settings { dtype: DType::F32, top_k: TOP_K, ..Settings::new(HIDDEN, EXPERTS) };
    let mut buffer = Buffer::new(communicator, settings)?;
    buffer.exchange(communicator)?;
    let mut model = Model {
        bias: vec![0.0; HIDDEN],
        router: random(1, EXPERTS * HIDDEN),
        experts: buffer
            .local_experts()
            .into_iter()
            .map(|expert| random(100 + expert, HIDDEN * HIDDEN))
            .collect(),
    };
    let mut losses = Vec::new();
    for step in 0..steps {
        losses.push(one_step(communicator, &mut buffer, &mut model, step)?);
    }
    buffer.close(communicator)?;
    Ok(losses)
}

fn one_step(communicator: &Communicator, buffer: &mut Buffer, model: &mut Model, step: usize) -> Result<f32> {
    // The ranks have equal parts of the batch; whoever comes last may have fewer tokens.
    let part = TOKENS.div_ceil(communicator.world_size());
    let mine = (communicator.rank() * part).min(TOKENS)..((communicator.rank() + 1) * part).min(TOKENS);
    let inputs: Vec<f32> =
        mine.clone().flat_map(|token| random(step * TOKENS + token + 10_000, HIDDEN)).collect();
    let targets: Vec<f32> = inputs.chunks(HIDDEN).flat_map(teacher).collect();
    let tokens: Vec<f32> = inputs.chunks(HIDDEN).flat_map(|x| add(x, &model.bias)).collect();

    // Forward: to the experts, and back.
    let routed = route(&model.router, &tokens);
    let dispatch = Dispatch::new(&tokens).top_k(&routed.experts, TOP_K).weights(&routed.weights);
    let sent = buffer.dispatch(&dispatch)?;
    let results = experts(model, &sent)?;
    let combined = buffer.combine(&Combine::new(&results, &sent.handle))?;
    let outputs = combined.x.as_slice::<f32>()?;

    // The loss, and its gradient.
    let errors: Vec<f32> = outputs.iter().zip(&targets).map(|(output, target)| output - target).collect();
    let mut loss = [errors.iter().map(|error| error * error).sum::<f32>() / (TOKENS * HIDDEN) as f32];
    communicator.all_reduce(&mut loss, ReduceOp::Sum)?;
    let gradients: Vec<f32> = errors.iter().map(|error| error * 2.0 / TOKENS as f32).collect();

    // Backward: the gradients go the way of the tokens; what the experts make of them comes back.
    let (arrived, _) = buffer.dispatch_cached(&CachedDispatch::new(&gradients, &sent.handle))?;
    let (of_tokens, of_weights) = learn(model, &sent, arrived.as_slice::<f32>()?)?;
    let combine = Combine::new(&of_tokens, &sent.handle).weights(&of_weights);
    let combined = buffer.combine(&combine)?;
    let Some(of_weights) = &combined.topk_weights else { unreachable!("weights were given") };
    let (of_tokens, of_weights) = (combined.x.as_slice::<f32>()?, of_weights.as_slice::<f32>()?);

    // What is the same on all ranks learns from all tokens.
    let (mut of_router, mut of_bias) = (vec![0.0; EXPERTS * HIDDEN], vec![0.0; HIDDEN]);
    for (token, x) in tokens.chunks(HIDDEN).enumerate() {
        let slots = token * TOP_K..(token + 1) * TOP_K;
        let (weights, of_weights) = (&routed.weights[slots.clone()], &of_weights[slots.clone()]);
        let mean = dot(weights, of_weights);
        let mut of_token = of_tokens[token * HIDDEN..][..HIDDEN].to_vec();
        for (at, expert) in routed.experts[slots].iter().enumerate() {
            let of_logit = weights[at] * (of_weights[at] - mean);
            let row = *expert as usize * HIDDEN..(*expert as usize + 1) * HIDDEN;
            add_scaled(&mut of_router[row.clone()], x, of_logit);
            add_scaled(&mut of_token, &model.router[row], of_logit);
        }
        add_scaled(&mut of_bias, &of_token, 1.0);
    }
    communicator.all_reduce(&mut of_router, ReduceOp::Sum)?;
    communicator.all_reduce(&mut of_bias, ReduceOp::Sum)?;
    add_scaled(&mut model.router, &of_router, -RATE);
    add_scaled(&mut model.bias, &of_bias, -RATE);
    Ok(loss[0])
}

/// The two best experts of each token, weighted by a softmax over both.
fn route(router: &[f32], tokens: &[f32]) -> Routed {
    let mut routed = Routed { experts: Vec::new(), weights: Vec::new() };
    for x in tokens.chunks(HIDDEN) {
        let mut logits: Vec<(usize, f32)> =
            router.chunks(HIDDEN).map(|row| dot(row, x)).enumerate().collect();
        logits.sort_by(|a, b| b.1.total_cmp(&a.1));
        let second = 1.0 / (1.0 + (logits[0].1 - logits[1].1).exp());
        routed.experts.extend(logits[..TOP_K].iter().map(|(expert, _)| *expert as i64));
        routed.weights.extend([1.0 - second, second]);
    }
    routed
}

/// What the experts of this rank make of each row: the weighted sum over those that it is for.
fn experts(model: &Model, sent: &Dispatched) -> Result<Vec<f32>> {
    let mut results = Vec::new();
    each_row(sent, |_, x, selected| {
        let mut result = vec![0.0; HIDDEN];
        for (_, expert, weight) in selected {
            add_scaled(&mut result, &apply(&model.experts[*expert], x), *weight);
        }
        results.extend(result);
    })?;
    Ok(results)
}

/// The experts of this rank learn from the `gradients` of their results; the gradients of rows and of weights.
fn learn(model: &mut Model, sent: &Dispatched, gradients: &[f32]) -> Result<(Vec<f32>, Vec<f32>)> {
    let (mut of_rows, mut of_weights) = (vec![0.0; gradients.len()], vec![0.0; sent.handle.rows() * TOP_K]);
    let mut of_experts = vec![vec![0.0; HIDDEN * HIDDEN]; model.experts.len()];
    each_row(sent, |row, x, selected| {
        let gradient = &gradients[row * HIDDEN..][..HIDDEN];
        for (slot, expert, weight) in selected {
            let matrix = &model.experts[*expert];
            of_weights[row * TOP_K + slot] = dot(gradient, &apply(matrix, x));
            for (at, gradient) in gradient.iter().enumerate() {
                let line = at * HIDDEN..(at + 1) * HIDDEN;
                add_scaled(&mut of_experts[*expert][line.clone()], x, weight * gradient);
                add_scaled(&mut of_rows[row * HIDDEN..][..HIDDEN], &matrix[line], weight * gradient);
            }
        }
    })?;
    for (expert, gradient) in model.experts.iter_mut().zip(&of_experts) {
        add_scaled(expert, gradient, -RATE);
    }
    Ok((of_rows, of_weights))
}

/// Calls `with` for each row: its number, its elements, and the (slot, local expert, weight) that it is here for.
fn each_row(sent: &Dispatched, mut with: impl FnMut(usize, &[f32], &[(usize, usize, f32)])) -> Result<()> {
    let (Some(experts), Some(weights)) = (&sent.topk_idx, &sent.topk_weights) else {
        unreachable!("they were sent")
    };
    let (experts, weights) = (experts.as_slice::<i64>()?, weights.as_slice::<f32>()?);
    for (row, x) in sent.x.as_slice::<f32>()?.chunks(HIDDEN).enumerate() {
        let selected: Vec<(usize, usize, f32)> = (0..TOP_K)
            .filter(|slot| experts[row * TOP_K + slot] >= 0)
            .map(|slot| (slot, experts[row * TOP_K + slot] as usize, weights[row * TOP_K + slot]))
            .collect();
        with(row, x, &selected);
    }
    Ok(())
}

/// What is to be learned: each of four corners of the input has a matrix of its own.
fn teacher(x: &[f32]) -> Vec<f32> {
    let corner = usize::from(x[0] > 0.0) + 2 * usize::from(x[1] > 0.0);
    apply(&random(900 + corner, HIDDEN * HIDDEN), x)
}

fn apply(matrix: &[f32], x: &[f32]) -> Vec<f32> {
    matrix.chunks(HIDDEN).map(|row| dot(row, x)).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn add_scaled(sum: &mut [f32], term: &[f32], factor: f32) {
    sum.iter_mut().zip(term).for_each(|(sum, term)| *sum += factor * term);
}

/// `count` numbers between −1 and 1 that follow from `seed`, scaled for matrices.
fn random(seed: usize, count: usize) -> Vec<f32> {
    let mut state = (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let scale = if count > HIDDEN { 0.5 } else { 1.0 };
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale
    };
    (0..count).map(next).collect()
}
