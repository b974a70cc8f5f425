//! Checks all lowered launches: kernels exist, they get the arguments that they declare, and grids have valid sizes.

use super::*;
use crate::cuda::source::MODULES;
use crate::cuda::step::{Operand, SHARED_BYTES_DEFAULT};
use crate::op::{Buffer, Einsum};
use crate::tensor::Region;

/// Shared memory per block on sm_80, in bytes, without the part that the driver reserves.
const SHARED_MAX: usize = 163 * 1024;

/// A launch on buffers of these shapes; reads listed in `ints` are integers.
fn launch(op: Op, reads: &[&[usize]], ints: &[usize], writes: &[&[usize]]) -> Launch {
    let mut offset = 0;
    let mut buffer = |shape: &[usize], dtype| {
        offset += 64;
        Buffer { base: 0, offset, shape: shape.to_vec(), dtype }
    };
    let dtype = |i| if ints.contains(&i) { DType::I32 } else { DType::F32 };
    let reads = reads.iter().enumerate().map(|(i, shape)| buffer(shape, dtype(i))).collect();
    let writes = writes.iter().map(|shape| buffer(shape, DType::F32)).collect();
    with_workspace(Launch { op, reads, writes, accumulate: false, workspace: None })
}

fn with_workspace(mut launch: Launch) -> Launch {
    let floats = workspace_bytes(&launch) / 4;
    let buffer = Buffer { base: 0, offset: 1 << 20, shape: vec![floats], dtype: DType::F32 };
    launch.workspace = (floats > 0).then_some(buffer);
    launch
}

/// A launch of each op on `rows` rows of `width` elements; attention heads have depth `width`.
fn launches(rows: usize, width: usize) -> Vec<Launch> {
    let (x, row, line): (&[usize], &[usize], &[usize]) = (&[1, rows, width], &[1, rows], &[width]);
    let (heads, lse): (&[usize], &[usize]) = (&[2, rows, 3, width], &[2, 3, rows]);
    let (src, dst) = (Region::whole(x), Region { start: vec![1, 2, 3], size: x.to_vec() });
    let larger: &[usize] = &[3, rows + 2, width + 5];
    let product = |text: &str| Op::Einsum(Einsum::parse(text).expect("the text is a valid einsum"));
    let adamw = Op::AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let dropout =
        |start: &[usize]| Op::Dropout { p: 0.1, seed: 1, shape: larger.to_vec(), start: start.to_vec(), stride: width };
    vec![
        launch(Op::Fill { value: 1.0 }, &[], &[], &[x]),
        launch(Op::Copy, &[x], &[], &[x]),
        launch(Op::Cast, &[x], &[], &[x]),
        launch(Op::CopyRegion { src, dst }, &[x], &[], &[larger]),
        launch(Op::Add, &[x, x], &[], &[x]),
        launch(Op::Add, &[x, line], &[], &[x]),
        launch(Op::SumLeading, &[x], &[], &[line]),
        launch(Op::SumLeading, &[x], &[], &[&[]]),
        launch(Op::Scale { factor: 2.0 }, &[x], &[], &[x]),
        launch(product("btc,cd->btd"), &[x, &[width, 7]], &[], &[&[1, rows, 7]]),
        launch(Op::Embedding { vocab_start: 0, vocab: 9 }, &[row, &[9, width]], &[0], &[x]),
        launch(Op::EmbeddingGrad { vocab_start: 0 }, &[row, x], &[0], &[&[9, width]]),
        launch(Op::LayerNorm { eps: 1e-5 }, &[x, line], &[], &[x, row, row]),
        launch(Op::LayerNormGrad, &[x, x, line, row, row], &[], &[x, line]),
        launch(Op::Gelu, &[x], &[], &[x]),
        launch(Op::GeluGrad, &[x, x], &[], &[x]),
        launch(Op::Attention { scale: 0.1 }, &[heads; 3], &[], &[heads, lse]),
        launch(Op::AttentionGrad { scale: 0.1 }, &[heads, heads, heads, heads, heads, lse], &[], &[heads; 3]),
        launch(Op::RowMax, &[x], &[], &[row]),
        launch(Op::SumExpTarget { vocab_start: 0, vocab: 9 }, &[x, row, row], &[2], &[row, row]),
        launch(Op::TokenLoss { scale: 0.1 }, &[row; 3], &[], &[&[]]),
        launch(Op::CrossEntropyGrad { vocab_start: 0, scale: 0.1 }, &[&[], x, row, row, row], &[4], &[x]),
        launch(dropout(&[1, 2, 3]), &[x, &[2]], &[1], &[x]),
        launch(Op::SumSquares { index: 1 }, &[x], &[], &[&[2, 2]]),
        launch(Op::ClipScale { max_norm: 1.0 }, &[&[3, 2]], &[], &[&[], &[]]),
        launch(adamw, &[x, &[2], &[]], &[], &[x; 3]),
    ]
}

/// The parameter types of a kernel, parsed from its source.
fn parameters(function: &str) -> Vec<String> {
    let head = format!(" {function}(");
    let definitions: Vec<&str> =
        MODULES.iter().filter_map(|module| module.text.split_once(&head)).map(|(_, after)| after).collect();
    assert_eq!(definitions.len(), 1, "{function} is defined {} times", definitions.len());
    let list = definitions[0].split_once(')').expect("a kernel has a list of parameters").0;
    let type_of = |parameter: &str| {
        let words: Vec<&str> = parameter.split_whitespace().collect();
        words[..words.len() - 1].join(" ")
    };
    list.split(',').map(type_of).collect()
}

fn element_fits(launch: &Launch, operand: Operand, element: &str) -> bool {
    let dtype = match operand {
        Operand::Read(i) => launch.reads[i].dtype,
        Operand::Write(i) => launch.writes[i].dtype,
        Operand::Workspace => DType::F32,
    };
    match dtype {
        DType::F32 => ["float", "u32", "void"].contains(&element),
        DType::I32 => ["int", "u32"].contains(&element),
        DType::BF16 => ["bf16", "unsigned short", "void"].contains(&element),
    }
}

fn fits(launch: &Launch, arg: &Arg, parameter: &str) -> bool {
    match arg {
        Arg::Pointer(place) => {
            let element = parameter.strip_prefix("const ").unwrap_or(parameter).strip_suffix('*');
            element.is_some_and(|element| element_fits(launch, place.operand, element))
                && (parameter.starts_with("const ") || is_writable(place.operand))
        }
        Arg::Null => parameter.ends_with('*'),
        Arg::ErrorRecord => parameter == "u32*",
        Arg::LaunchIndex | Arg::U32(_) => parameter == "u32",
        Arg::I32(_) => parameter == "int",
        Arg::I64(_) => parameter == "i64",
        Arg::U64(_) => parameter == "u64",
        Arg::F32(_) => parameter == "float",
        Arg::F64(_) => parameter == "double",
    }
}

fn is_writable(operand: Operand) -> bool {
    !matches!(operand, Operand::Read(_))
}

/// Returns the launch and its bf16 variants: all reads that allow bf16 are bf16, and there is one variant for each
/// subset of the writes that allow bf16.
fn dtype_variants(launch: Launch) -> Vec<Launch> {
    let bf16_writes: Vec<usize> = (0..launch.writes.len()).filter(|&i| launch.op.writes_bf16(i)).collect();
    let mut half = launch.clone();
    let reads: Vec<usize> = (0..launch.reads.len()).filter(|&i| launch.op.reads_bf16(i)).collect();
    reads.iter().for_each(|&i| half.reads[i].dtype = DType::BF16);
    let is_copy = matches!(launch.op, Op::Copy | Op::CopyRegion { .. });
    let mut all = if matches!(launch.op, Op::Cast) { vec![] } else { vec![launch] };
    for subset in 0..1 << bf16_writes.len() {
        let mut launch = half.clone();
        let chosen = bf16_writes.iter().enumerate().filter(|(bit, _)| subset & (1 << bit) != 0);
        chosen.for_each(|(_, &i)| launch.writes[i].dtype = DType::BF16);
        // A copy keeps the dtype, and a cast changes it.
        let same = launch.reads.first().map(|read| read.dtype) == Some(launch.writes[0].dtype);
        let fitting = if is_copy { same } else { !same || !matches!(launch.op, Op::Cast) };
        all.extend(fitting.then_some(with_workspace(launch)));
    }
    all
}

fn check(name: &str, launch: &Launch, step: &Step) {
    if let Step::Product(product) = step {
        let operands = launch.reads.iter().map(|read| read.dtype);
        assert!(operands.eq([product.a.dtype, product.b.dtype]), "{name}: wrong operand types: {product:?}");
        assert_eq!(product.d.dtype, launch.writes[0].dtype, "{name}: wrong type of the result");
    }
    let Step::Kernel(kernel) = step else { return };
    let parameters = parameters(kernel.function);
    assert_eq!(kernel.args.len(), parameters.len(), "{name}: wrong number of arguments for {parameters:?}: {kernel:?}");
    for (arg, parameter) in kernel.args.iter().zip(&parameters) {
        assert!(fits(launch, arg, parameter), "{name}: {}: argument {arg:?} does not fit {parameter}", kernel.function);
    }
    let [x, y, z] = kernel.grid;
    assert!((1..=i32::MAX as u32).contains(&x) && (1..=65_535).contains(&y) && z == 1, "{name}: bad grid: {kernel:?}");
    let threads: u32 = kernel.block.iter().product();
    assert!(threads.is_multiple_of(32) && threads <= 1024, "{name}: bad block: {kernel:?}");
    let tiled = kernel.function.starts_with("attention");
    let shared_max = if tiled { SHARED_MAX as u32 } else { SHARED_BYTES_DEFAULT };
    assert!(kernel.shared_bytes <= shared_max, "{name}: too much shared memory: {kernel:?}");
}

#[test]
fn steps_match_the_parameters_of_their_kernels() {
    for rows in [0, 1, 3, 65, 1000, 1 << 20] {
        for width in [0, 1, 5, 32, 64, 80, 128, 129, 768, 50_257] {
            for launch in launches(rows, width).into_iter().flat_map(dtype_variants) {
                let types = |buffers: &[Buffer]| buffers.iter().map(|buffer| buffer.dtype).collect::<Vec<_>>();
                let types = (types(&launch.reads), types(&launch.writes));
                let name = format!("{} of {rows} by {width}, {types:?}", launch.op.name());
                for accumulate in [false, true] {
                    let sum = launch.op.can_accumulate().map(|i| launch.writes[i].dtype);
                    if accumulate && sum != Some(DType::F32) {
                        continue;
                    }
                    let steps =
                        lower(&launch, accumulate, SHARED_MAX).unwrap_or_else(|error| panic!("{name}: {error}"));
                    steps.iter().for_each(|step| check(&name, &launch, step));
                }
            }
        }
    }
}

#[test]
fn grids_cover_more_elements_than_32_bits_can_count() {
    let n = (1 << 33) + 3;
    let steps = lower(&launch(Op::Gelu, &[&[n]], &[], &[&[n]]), false, SHARED_MAX).expect("it is lowered");
    let [Step::Kernel(kernel)] = &steps[..] else { panic!("{steps:?}") };
    assert!(u64::from(kernel.grid[0]) * 256 * 4 >= n as u64);
    // A grid with too many blocks is refused, not truncated.
    let n = 1 << 44;
    let error = lower(&launch(Op::Gelu, &[&[n]], &[], &[&[n]]), false, SHARED_MAX).expect_err("too large");
    assert_eq!(error.to_string(), "gelu_f32: blocks: expected at most 2147483647, got 17179869184");
}

#[test]
fn launches_that_do_not_fit_are_refused() {
    let check = |launch: &Launch, accumulate, expected: &str| {
        assert_eq!(lower(launch, accumulate, SHARED_MAX).expect_err("refused").to_string(), expected);
    };
    let gelu = |reads: &[&[usize]], writes: &[&[usize]]| launch(Op::Gelu, reads, &[], writes);
    check(&gelu(&[&[2]], &[]), false, "gelu: buffers: expected 1 read, 1 written, got 1 read, 0 written");
    let expected = "gelu: number of elements of write 0: expected 2, as in read 0 of shape [2], got 3 in [3]";
    check(&gelu(&[&[2]], &[&[3]]), false, expected);
    check(&gelu(&[&[2]], &[&[2]]), true, "gelu: accumulate: expected an op that can accumulate, got gelu");
    let ids = launch(Op::Gelu, &[&[2]], &[0], &[&[2]]);
    check(&ids, false, "gelu: dtype of read 0: expected F32, got I32");
    let mut halves = launch(Op::Gelu, &[&[2]], &[], &[&[2]]);
    halves.writes[0].dtype = DType::BF16;
    check(&halves, false, "gelu: dtype of write 0: expected F32, like the reads, got BF16");
    let mut sum = launch(Op::Add, &[&[2], &[2]], &[], &[&[2]]);
    sum.reads[1].dtype = DType::BF16;
    check(&sum, false, "add: dtype of read 0: expected BF16, like the other reads, got F32");
    let mut table = launch(Op::Embedding { vocab_start: 0, vocab: 9 }, &[&[2], &[9, 3]], &[0], &[&[2, 3]]);
    table.reads[1].dtype = DType::BF16;
    check(&table, false, "embedding: dtype of read 1: expected F32 or I32, got BF16");
    let mut grad = launch(Op::LayerNormGrad, &[&[900, 8], &[900, 8], &[8], &[900], &[900]], &[], &[&[900, 8], &[8]]);
    grad.workspace = None;
    check(&grad, false, "layer_norm_grad: workspace: expected 64 bytes, got 0 bytes");
}

#[test]
fn plain_kernels_run_deep_heads_if_tiles_do_not_fit() {
    let names = |depth: usize, shared: usize| -> Vec<&'static str> {
        let (heads, lse): (&[usize], &[usize]) = (&[2, 70, 3, depth], &[2, 3, 70]);
        let forward = launch(Op::Attention { scale: 0.1 }, &[heads; 3], &[], &[heads, lse]);
        let reads = [heads, heads, heads, heads, heads, lse];
        let backward = launch(Op::AttentionGrad { scale: 0.1 }, &reads, &[], &[heads; 3]);
        let steps = [forward, backward].map(|launch| lower(&launch, false, shared).expect("it is lowered")).concat();
        let kernel = |step: &Step| match step {
            Step::Kernel(kernel) => {
                assert!(kernel.shared_bytes as usize <= shared, "{kernel:?}");
                kernel.function
            }
            other => panic!("{other:?}"),
        };
        steps.iter().map(kernel).collect()
    };
    let [delta, tiled_128] = ["attention_delta_f32", "attention_f32_d128"];
    let (keys, queries) = ("attention_grad_keys_f32_d128", "attention_grad_queries_f32_d128");
    assert_eq!(names(128, 163 << 10), [tiled_128, delta, keys, queries]);
    let (keys, queries) = ("attention_grad_keys_plain_f32", "attention_grad_queries_plain_f32");
    assert_eq!(names(128, 99 << 10), [tiled_128, delta, keys, queries], "sm_86 and sm_89");
    assert_eq!(names(128, 48 << 10), ["attention_plain_f32", delta, keys, queries]);
    let (keys, queries) = ("attention_grad_keys_f32_d96", "attention_grad_queries_f32_d96");
    assert_eq!(names(96, 99 << 10), ["attention_f32_d96", delta, keys, queries]);
}
