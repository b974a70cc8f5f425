//! Tests cuDNN on the software device: the results of a small graph, and planted mistakes.

use std::ffi::c_void;
use std::ptr::{from_ref, null_mut};

use cudarc::cudnn::sys::{
    self, cudnnBackendAttributeName_t as Attribute, cudnnBackendAttributeType_t as Type, cudnnBackendDescriptor_t,
    cudnnBackendDescriptorType_t as Kind, cudnnBackendHeurMode_t as Heuristic, cudnnDataType_t as Data,
    cudnnPointwiseMode_t as Mode, cudnnStatus_t as Answer,
};
use cudarc::driver::sys::CUstream;

use crate::api::{self, alloc, filled, free, read, stream, wait};
use crate::bugs::{Bug, LoadedKernels, expect_found, run_all};
use crate::cuda;

/// The mistakes.
pub const BUGS: &[Bug] = &[
    Bug { name: "a descriptor that is not finalised", kinds: &["misuse: not finalised"], run: not_finalised },
    Bug { name: "a tensor without dims", kinds: &["misuse: without CUDNN_ATTR_TENSOR_DIMENSIONS"], run: no_dims },
    Bug { name: "a tensor whose rows overlap", kinds: &["misuse: elements overlap"], run: overlapping },
    Bug { name: "a stride past the buffer", kinds: &["bounds"], run: wide },
    Bug { name: "two tensors with one id", kinds: &["misuse: the unique id"], run: duplicate_ids },
    Bug { name: "operations out of order", kinds: &["misuse: before it is written"], run: unordered },
    Bug { name: "no workspace", kinds: &["misuse: without its workspace"], run: no_workspace },
    Bug { name: "one workspace for two streams", kinds: &["race"], run: shared_workspace },
    Bug { name: "an uninitialised buffer", kinds: &["uninitialised"], run: empty },
    Bug { name: "an address off its alignment", kinds: &["misuse: not aligned"], run: unaligned },
    Bug { name: "a tensor without an address", kinds: &["misuse: without an address"], run: no_address },
];

/// In the child: checks the results, then runs all programs with mistakes.
pub fn check() {
    values();
    run_all(BUGS, 1);
}

/// Mistakes in a graph and its buffers.
#[derive(Clone, Copy, Default)]
struct GraphFault {
    open: bool,
    no_dims: bool,
    row_stride: Option<i64>,
    duplicate_ids: bool,
    unordered: bool,
    no_mask: bool,
    no_workspace: bool,
    no_address: bool,
    offset: u64,
}

fn attribute<T>(descriptor: cudnnBackendDescriptor_t, name: Attribute, kind: Type, values: &[T]) -> Answer {
    let (count, start) = (values.len() as i64, values.as_ptr().cast::<c_void>());
    // SAFETY: `values` holds `count` values of this type.
    unsafe { sys::cudnnBackendSetAttribute(descriptor, name, kind, count, start) }
}

/// Creates descriptors, and destroys them when the builder is dropped. After a refusal, the builder makes no more
/// changes.
struct Builder {
    made: Vec<cudnnBackendDescriptor_t>,
    refused: bool,
}

impl Builder {
    fn open(&mut self, kind: Kind) -> cudnnBackendDescriptor_t {
        let mut made = null_mut();
        // SAFETY: the function writes a handle to a local variable.
        let answer = unsafe { sys::cudnnBackendCreateDescriptor(kind, &mut made) };
        assert_eq!(answer, Answer::CUDNN_STATUS_SUCCESS);
        self.made.push(made);
        made
    }

    fn set<T>(&mut self, to: cudnnBackendDescriptor_t, name: Attribute, kind: Type, values: &[T]) {
        self.refused = self.refused || attribute(to, name, kind, values) != Answer::CUDNN_STATUS_SUCCESS;
    }

    fn link(&mut self, to: cudnnBackendDescriptor_t, name: Attribute, of: cudnnBackendDescriptor_t) {
        self.set(to, name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &[of]);
    }

    fn seal(&mut self, descriptor: cudnnBackendDescriptor_t) -> cudnnBackendDescriptor_t {
        // SAFETY: the descriptor comes from the library.
        self.refused = self.refused || unsafe { sys::cudnnBackendFinalize(descriptor) } != Answer::CUDNN_STATUS_SUCCESS;
        descriptor
    }

    fn tensor(&mut self, id: i64, (rows, columns): (i64, i64), data: Data, place: u8, fault: GraphFault) -> Descriptor {
        let made = self.open(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR);
        self.set(made, Attribute::CUDNN_ATTR_TENSOR_UNIQUE_ID, Type::CUDNN_TYPE_INT64, &[id]);
        self.set(made, Attribute::CUDNN_ATTR_TENSOR_DATA_TYPE, Type::CUDNN_TYPE_DATA_TYPE, &[data]);
        self.set(made, Attribute::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, Type::CUDNN_TYPE_INT64, &[16i64]);
        if !fault.no_dims {
            self.set(made, Attribute::CUDNN_ATTR_TENSOR_DIMENSIONS, Type::CUDNN_TYPE_INT64, &[1, 1, rows, columns]);
        }
        let stride = fault.row_stride.unwrap_or(columns);
        let strides = [rows * stride, rows * stride, stride, 1];
        self.set(made, Attribute::CUDNN_ATTR_TENSOR_STRIDES, Type::CUDNN_TYPE_INT64, &strides);
        self.set(made, Attribute::CUDNN_ATTR_TENSOR_IS_VIRTUAL, Type::CUDNN_TYPE_BOOLEAN, &[place == VIRTUAL]);
        self.set(made, Attribute::CUDNN_ATTR_TENSOR_IS_BY_VALUE, Type::CUDNN_TYPE_BOOLEAN, &[place == NUMBER]);
        if fault.open { made } else { self.seal(made) }
    }

    fn product(&mut self, [a, b, c]: [Descriptor; 3]) -> Descriptor {
        let matmul = self.open(Kind::CUDNN_BACKEND_MATMUL_DESCRIPTOR);
        let float = [Data::CUDNN_DATA_FLOAT];
        self.set(matmul, Attribute::CUDNN_ATTR_MATMUL_COMP_TYPE, Type::CUDNN_TYPE_DATA_TYPE, &float);
        self.seal(matmul);
        let made = self.open(Kind::CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
        self.link(made, Attribute::CUDNN_ATTR_OPERATION_MATMUL_DESC, matmul);
        self.link(made, Attribute::CUDNN_ATTR_OPERATION_MATMUL_ADESC, a);
        self.link(made, Attribute::CUDNN_ATTR_OPERATION_MATMUL_BDESC, b);
        self.link(made, Attribute::CUDNN_ATTR_OPERATION_MATMUL_CDESC, c);
        self.seal(made)
    }

    fn pointwise(&mut self, mode: Mode, axis: Option<i64>, operands: &[Descriptor], y: Descriptor) -> Descriptor {
        let pointwise = self.open(Kind::CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
        self.set(pointwise, Attribute::CUDNN_ATTR_POINTWISE_MODE, Type::CUDNN_TYPE_POINTWISE_MODE, &[mode]);
        let float = [Data::CUDNN_DATA_FLOAT];
        self.set(pointwise, Attribute::CUDNN_ATTR_POINTWISE_MATH_PREC, Type::CUDNN_TYPE_DATA_TYPE, &float);
        if let Some(axis) = axis {
            self.set(pointwise, Attribute::CUDNN_ATTR_POINTWISE_AXIS, Type::CUDNN_TYPE_INT64, &[axis]);
        }
        self.seal(pointwise);
        let made = self.open(Kind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
        self.link(made, Attribute::CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, pointwise);
        let names = [
            Attribute::CUDNN_ATTR_OPERATION_POINTWISE_XDESC,
            Attribute::CUDNN_ATTR_OPERATION_POINTWISE_BDESC,
            Attribute::CUDNN_ATTR_OPERATION_POINTWISE_TDESC,
        ];
        for (name, operand) in names.into_iter().zip(operands) {
            self.link(made, name, *operand);
        }
        self.link(made, Attribute::CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y);
        self.seal(made)
    }
}

impl Drop for Builder {
    fn drop(&mut self) {
        for descriptor in &self.made {
            // SAFETY: the descriptor was created here and is destroyed once.
            unsafe { sys::cudnnBackendDestroyDescriptor(*descriptor) };
        }
    }
}

type Descriptor = cudnnBackendDescriptor_t;

const BUFFER: u8 = 0;
const VIRTUAL: u8 = 1;
const NUMBER: u8 = 2;

/// Number of rows of a and of v, and number of columns of b.
const N: usize = 2;
const DEPTH: usize = 8;

/// The buffers of the graph `o = mask(a b) v`. The matrix a is 2 x 8, b is 8 x 2, and v is 2 x 8.
#[derive(Clone, Copy)]
struct Buffers {
    a: u64,
    b: u64,
    v: u64,
    o: u64,
    workspace: u64,
}

impl Buffers {
    fn new() -> Buffers {
        let ramp = |n: usize, step: f32| (0..n).map(|i| i as f32 * step - 1.0).collect::<Vec<f32>>();
        let (a, b, v) = (filled(&ramp(N * DEPTH, 0.25)), filled(&ramp(DEPTH * N, 0.5)), filled(&ramp(N * DEPTH, 0.5)));
        Buffers { a, b, v, o: alloc(N * DEPTH), workspace: alloc(64) }
    }

    fn free(self) {
        [self.a, self.b, self.v, self.o, self.workspace].into_iter().for_each(free);
    }

    /// Builds and runs the graph. Returns false if a call was refused.
    fn run(&self, s: CUstream, fault: GraphFault) -> bool {
        let mut handle = null_mut();
        // SAFETY: the first call writes a handle to a local variable; the second gets a live handle and stream.
        unsafe {
            assert_eq!(sys::cudnnCreate(&mut handle), Answer::CUDNN_STATUS_SUCCESS);
            assert_eq!(sys::cudnnSetStream(handle, s.cast()), Answer::CUDNN_STATUS_SUCCESS);
        }
        let mut builder = Builder { made: Vec::new(), refused: false };
        let whole = self.graph(&mut builder, fault, handle);
        let done = !builder.refused && self.execute(&mut builder, whole, handle, fault);
        // SAFETY: the handle was created above.
        unsafe { sys::cudnnDestroy(handle) };
        done
    }

    fn graph(&self, builder: &mut Builder, fault: GraphFault, handle: sys::cudnnHandle_t) -> Descriptor {
        let (f32, wide, deep) = (Data::CUDNN_DATA_FLOAT, (N as i64, N as i64), (N as i64, DEPTH as i64));
        let no_fault = GraphFault::default();
        let a = builder.tensor(1, deep, f32, BUFFER, fault);
        let b = builder.tensor(2, (DEPTH as i64, N as i64), f32, BUFFER, no_fault);
        let v = builder.tensor(if fault.duplicate_ids { 2 } else { 3 }, deep, f32, BUFFER, no_fault);
        let o = builder.tensor(4, deep, f32, BUFFER, no_fault);
        let mut scores = |id, data| builder.tensor(id, wide, data, VIRTUAL, no_fault);
        let [s, masked] = [5, 6].map(|id| scores(id, f32));
        let [row, column] = [7, 8].map(|id| scores(id, Data::CUDNN_DATA_INT32));
        let keep = scores(9, Data::CUDNN_DATA_BOOLEAN);
        let zero = builder.tensor(10, (1, 1), f32, NUMBER, no_fault);
        let mut operations = vec![builder.product([a, b, s])];
        if fault.no_mask {
            operations.push(builder.pointwise(Mode::CUDNN_POINTWISE_ADD, None, &[s, zero], masked));
        } else {
            operations.push(builder.pointwise(Mode::CUDNN_POINTWISE_GEN_INDEX, Some(2), &[s], row));
            operations.push(builder.pointwise(Mode::CUDNN_POINTWISE_GEN_INDEX, Some(3), &[s], column));
            operations.push(builder.pointwise(Mode::CUDNN_POINTWISE_CMP_GE, None, &[row, column], keep));
            operations.push(builder.pointwise(Mode::CUDNN_POINTWISE_BINARY_SELECT, None, &[s, zero, keep], masked));
        }
        operations.push(builder.product([masked, v, o]));
        if fault.unordered {
            operations.reverse();
        }
        let whole = builder.open(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
        builder.set(whole, Attribute::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, Type::CUDNN_TYPE_HANDLE, &[handle]);
        let (ops, kind) = (Attribute::CUDNN_ATTR_OPERATIONGRAPH_OPS, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR);
        builder.set(whole, ops, kind, &operations);
        builder.seal(whole)
    }

    fn execute(&self, builder: &mut Builder, whole: Descriptor, handle: sys::cudnnHandle_t, fault: GraphFault) -> bool {
        let heuristic = builder.open(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
        builder.link(heuristic, Attribute::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, whole);
        let mode = [Heuristic::CUDNN_HEUR_MODE_A];
        builder.set(heuristic, Attribute::CUDNN_ATTR_ENGINEHEUR_MODE, Type::CUDNN_TYPE_HEUR_MODE, &mode);
        builder.seal(heuristic);
        let (mut configuration, mut count) = (builder.open(Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR), 0);
        let (results, kind) = (Attribute::CUDNN_ATTR_ENGINEHEUR_RESULTS, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR);
        let to = (&raw mut configuration).cast();
        // SAFETY: the function fills in at most one descriptor, and `to` points to it.
        let answer = unsafe { sys::cudnnBackendGetAttribute(heuristic, results, kind, 1, &mut count, to) };
        assert_eq!((answer, count), (Answer::CUDNN_STATUS_SUCCESS, 1));
        let plan = builder.open(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
        builder.set(plan, Attribute::CUDNN_ATTR_EXECUTION_PLAN_HANDLE, Type::CUDNN_TYPE_HANDLE, &[handle]);
        builder.link(plan, Attribute::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, configuration);
        builder.seal(plan);
        let pack = builder.open(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
        let zero = 0f32;
        let zero = from_ref(&zero).expose_provenance() as u64;
        let mut given = vec![(1, self.a + fault.offset), (2, self.b), (3, self.v), (4, self.o), (10, zero)];
        given.truncate(if fault.no_address { 4 } else { 5 });
        let (ids, pointers): (Vec<i64>, Vec<u64>) = given.into_iter().unzip();
        builder.set(pack, Attribute::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, Type::CUDNN_TYPE_INT64, &ids);
        builder.set(pack, Attribute::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, Type::CUDNN_TYPE_VOID_PTR, &pointers);
        if !fault.no_workspace {
            let workspace = Attribute::CUDNN_ATTR_VARIANT_PACK_WORKSPACE;
            builder.set(pack, workspace, Type::CUDNN_TYPE_VOID_PTR, &[self.workspace]);
        }
        builder.seal(pack);
        // SAFETY: the handles are live. The buffers are on the device, and host scalars live until this call returns.
        unsafe { sys::cudnnBackendExecute(handle, plan, pack) == Answer::CUDNN_STATUS_SUCCESS }
    }
}

/// Compares the graph's results with values computed by hand, with and without the mask.
fn values() {
    api::use_device(0);
    let (s, buffers) = (stream(), Buffers::new());
    let [a, b, v] = [buffers.a, buffers.b, buffers.v].map(|at| read(at, N * DEPTH, s));
    let expected = |is_masked: bool| -> Vec<f32> {
        let score = |i: usize, j: usize| match j > i && is_masked {
            true => 0.0,
            false => (0..DEPTH).map(|k| a[i * DEPTH + k] * b[k * N + j]).sum::<f32>(),
        };
        let at = |p: usize| (0..N).map(|j| score(p / DEPTH, j) * v[j * DEPTH + p % DEPTH]).sum();
        (0..N * DEPTH).map(at).collect()
    };
    for is_masked in [true, false] {
        assert!(buffers.run(s, GraphFault { no_mask: !is_masked, ..GraphFault::default() }));
        assert_eq!(read(buffers.o, N * DEPTH, s), expected(is_masked));
    }
    assert_ne!(expected(true), expected(false));
    buffers.free();
    cuda!(cuStreamDestroy_v2(s));
}

/// Runs the graph once, with the mistake `fault` if `planted` is true. The library may refuse such a run.
fn run_once(planted: bool, fault: GraphFault) {
    let (s, buffers) = (stream(), Buffers::new());
    buffers.run(s, if planted { fault } else { GraphFault::default() });
    wait(s);
    buffers.free();
    cuda!(cuStreamDestroy_v2(s));
}

fn not_finalised(_: &LoadedKernels, planted: bool) {
    run_once(planted, GraphFault { open: true, ..GraphFault::default() });
}

fn no_dims(_: &LoadedKernels, planted: bool) {
    run_once(planted, GraphFault { no_dims: true, ..GraphFault::default() });
}

fn overlapping(_: &LoadedKernels, planted: bool) {
    run_once(planted, GraphFault { row_stride: Some(DEPTH as i64 - 1), ..GraphFault::default() });
}

fn wide(_: &LoadedKernels, planted: bool) {
    run_once(planted, GraphFault { row_stride: Some(2 * DEPTH as i64), ..GraphFault::default() });
}

fn duplicate_ids(_: &LoadedKernels, planted: bool) {
    run_once(planted, GraphFault { duplicate_ids: true, ..GraphFault::default() });
}

fn unordered(_: &LoadedKernels, planted: bool) {
    run_once(planted, GraphFault { unordered: true, ..GraphFault::default() });
}

fn no_workspace(_: &LoadedKernels, planted: bool) {
    run_once(planted, GraphFault { no_workspace: true, ..GraphFault::default() });
}

fn no_address(_: &LoadedKernels, planted: bool) {
    run_once(planted, GraphFault { no_address: true, ..GraphFault::default() });
}

fn unaligned(_: &LoadedKernels, planted: bool) {
    run_once(planted, GraphFault { offset: 4, ..GraphFault::default() });
}

fn empty(_: &LoadedKernels, planted: bool) {
    let (s, buffers) = (stream(), Buffers::new());
    let without = alloc(N * DEPTH);
    let a = if planted { without } else { buffers.a };
    Buffers { a, ..buffers }.run(s, GraphFault::default());
    wait(s);
    free(without);
    buffers.free();
    cuda!(cuStreamDestroy_v2(s));
}

fn shared_workspace(_: &LoadedKernels, planted: bool) {
    let (streams, all) = ([stream(), stream()], [Buffers::new(), Buffers::new()]);
    let workspace = if planted { all[0].workspace } else { all[1].workspace };
    all[0].run(streams[0], GraphFault::default());
    Buffers { workspace, ..all[1] }.run(streams[1], GraphFault::default());
    streams.into_iter().for_each(wait);
    all.into_iter().for_each(Buffers::free);
    for s in streams {
        cuda!(cuStreamDestroy_v2(s));
    }
}

#[test]
fn graph_results_are_right_and_mistakes_are_found() {
    expect_found("graphs", 1);
}
