//! Lines of 128 bytes: that they arrive whole, and that calls in lines may follow each other at once, whatever forms stand between them.

use unisono::cuda::{Cache, Compiler, DeviceBuffer, Grid, Module, Source};
use unisono::gpu::kernels::{Purpose, architecture, source};
use unisono::gpu::{ArenaLayout, Link};
use unisono::{DType, DeviceView, Form, Memory, Operations};
use unisono_core::device::Wish;

use crate::OPERATIONS;
use crate::numbers::{self, Random};
use crate::scale::scale;
use crate::windows::on_threads;
use crate::world::{Case, World, devices};

/// What `hammer` of `lines.cu` takes.
#[repr(C)]
struct Hammer {
    shared: DeviceView,
    answer: u64,
    most_ns: u64,
    rounds: u32,
    units: u32,
}

/// The kernel for so many ranks, with the headers that our own kernels include.
fn hammer(ranks: usize) -> Source {
    let layout = ArenaLayout::new(ranks, Link::Device);
    Source { name: "lines.cu", text: include_str!("lines.cu"), ..source(&layout, Purpose::Copies) }
}

/// `UNISONO_TEST_SCALE=50` stores fifty times as often.
#[test]
fn lines_arrive_whole_however_often_they_are_overwritten() {
    const UNITS: u32 = 1000;
    let rounds = 20_000 * scale() as u32;
    for ranks in [2, devices().len().max(2)] {
        on_threads(ranks, |rank, tools| {
            if !rank.gpu_rules().unwrap().have_lines() {
                eprintln!("SKIPPED: no lines between these devices");
                rank.destroy().unwrap();
                return;
            }
            let device = tools.raw.device();
            let room = ranks * UNITS as usize * 256;
            let shared = rank.window::<u8>(room, Memory::Device).unwrap().into_symmetric(&rank).unwrap();
            let cubin = Cache::of_user().cubin(&hammer(ranks), architecture(device), Compiler::find).unwrap();
            let kernel = Module::load(device, &cubin).unwrap().function("hammer").unwrap();
            let mut answer = DeviceBuffer::new(device, 24).unwrap();
            answer.write(0, &[0; 24]).unwrap();
            let (view, at) = (shared.device_view().unwrap(), answer.address());
            let mut hammer = Hammer { shared: view, answer: at, most_ns: 30 << 30, rounds, units: UNITS };
            rank.barrier().unwrap();
            let grid = Grid { blocks: 48, threads: 512, shared_bytes: 0, is_early: false };
            // SAFETY: the arguments are those of the kernel, and what they name stays until the stream was waited for.
            unsafe { kernel.launch(&tools.raw, grid, (&raw mut hammer).cast()) }.unwrap();
            tools.raw.synchronize().unwrap();
            let mut words = [0; 24];
            answer.read(0, &mut words).unwrap();
            let [looks, torn, gave_up] = *words.as_chunks().0 else { unreachable!() };
            let [looks, torn, gave_up] = [looks, torn, gave_up].map(u64::from_le_bytes);
            println!("rank {} of {ranks}: {looks} looks at lines, {torn} torn parts", rank.rank());
            assert_eq!((torn, gave_up), (0, 0));
            // Each line was seen at the end at least.
            assert!(looks >= 2 * u64::from(UNITS) * (ranks as u64 - 1), "{looks}");
            rank.barrier().unwrap();
            shared.close(&rank).unwrap();
            rank.destroy().unwrap();
        });
    }
}

/// Which area of lines a call may fill follows from the calls before: so forms change from call to call here, roots too, and nobody
/// waits in between. `UNISONO_TEST_SCALE` repeats it, `UNISONO_TEST_SEED` repeats one run.
#[test]
fn calls_by_lines_follow_each_other_at_once_whatever_stands_between() {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    let seed = numbers::seed();
    println!("UNISONO_TEST_SEED={seed}");
    let mut random = Random::new(seed);
    // Lines more often than what stands between them.
    const FORMS: [Form; 8] = [
        Form::OneShotLines,
        Form::TwoShotLines,
        Form::OneShotLines,
        Form::TwoShotLines,
        Form::TwoShotLines,
        Form::OneShot,
        Form::TwoShot,
        Form::Bulk,
    ];
    for ranks in [2, 3, devices.len().max(4)] {
        let mut world = World::new(ranks, &devices, |builder| builder);
        for _ in 0..4 * scale() {
            let cases: Vec<(Case, Option<Form>)> = (0..48)
                .map(|at| {
                    // Every other one in two shots, which overwrites what is taken last; small and large ones.
                    let of = if at % 2 == 0 { 2 } else { OPERATIONS.len() };
                    let (operation, root) = (OPERATIONS[random.below(of)], random.below(ranks));
                    let count = random.count(100_000);
                    let (is_in_place, offset) = (random.once_in(3), 4 * random.below(5));
                    let case = Case {
                        operation,
                        dtype: DType::F32,
                        count,
                        root,
                        is_in_place,
                        offset,
                        ..Case::default()
                    };
                    let form = FORMS[random.below(FORMS.len())];
                    (case, form.serves(case.kind(0)).then_some(form))
                })
                .collect();
            world.check_all(&cases, |world, form| {
                let wish = form.map(|form| Wish { form, blocks: 0, tile: 0 });
                for rank in &mut world.ranks {
                    let rules = rank.gpu_rules().unwrap();
                    rank.change_gpu_rules(&unisono::tuning::device::select::Rules { forced: wish, ..rules })
                        .unwrap();
                }
            });
        }
        world.end();
    }
}
