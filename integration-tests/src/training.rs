//! Trains a small GPT through the public API on an embedded text, on any mesh. Every layout uses the same samples and
//! initial weights as [`crate::reference`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use shardflow::graph::{AdamW, Graph};
use shardflow::nn::{self, GptConfig};
use shardflow::passes::{CompileOptions, compile};
use shardflow::placement::Mesh;
use shardflow::plan::{Plan, Schedule};
use shardflow::session::{Session, SessionOptions, StepReport};
use shardflow_kernels::tensor::{DType, HostTensor};

use crate::reference;

/// Shakespeare's sonnets 18 and 29. They have 46 distinct bytes, which is not a multiple of 3 or 4.
pub const TEXT: &str = "\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date;
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st;
Nor shall death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st:
So long as men can breathe or eyes can see,
So long lives this, and this gives life to thee.

When, in disgrace with fortune and men's eyes,
I all alone beweep my outcast state,
And trouble deaf heaven with my bootless cries,
And look upon myself and curse my fate,
Wishing me like to one more rich in hope,
Featured like him, like him with friends possess'd,
Desiring this man's art and that man's scope,
With what I most enjoy contented least;
Yet in these thoughts myself almost despising,
Haply I think on thee, and then my state,
Like to the lark at break of day arising
From sullen earth, sings hymns at heaven's gate;
For thy sweet love remember'd such wealth brings
That then I scorn to change my state with kings.
";

/// The mesh of one device.
pub const ONE: &str = "data=1";

/// Learning rate of every step.
pub const LEARNING_RATE: f32 = 1e-3;

/// The model and its data.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// Transformer layers.
    pub layers: usize,
    /// Attention heads. Their number divides `width`.
    pub heads: usize,
    /// Features per token.
    pub width: usize,
    /// Tokens per sample.
    pub context: usize,
    /// Samples per step.
    pub batch: usize,
    /// Dropout probability.
    pub dropout: f32,
    /// Gradients with a larger norm are clipped. If this is infinite, no gradient is clipped.
    pub max_norm: f32,
}

impl Default for Model {
    fn default() -> Self {
        Self { layers: 4, heads: 4, width: 32, context: 16, batch: 12, dropout: 0.0, max_norm: f32::INFINITY }
    }
}

impl Model {
    /// Returns the same model and training for the float64 reference. The reference has no dropout.
    pub fn reference(&self) -> reference::ReferenceConfig {
        assert_eq!(self.dropout, 0.0, "the reference has no dropout");
        reference::ReferenceConfig { lr: f64::from(LEARNING_RATE), max_norm: f64::from(self.max_norm), ..self.sizes() }
    }

    fn sizes(&self) -> reference::ReferenceConfig {
        reference::ReferenceConfig::new(self.layers, self.heads, self.width, self.context, self.batch)
    }

    /// Returns the training program.
    pub fn graph(&self, mesh: &str) -> Graph {
        let mut g = Graph::new(&Mesh::parse(mesh).unwrap_or_else(|e| panic!("{e}")));
        let config = GptConfig {
            vocabulary: vocabulary(),
            layers: self.layers,
            heads: self.heads,
            width: self.width,
            context: self.context,
            batch: self.batch,
            dropout: self.dropout,
        };
        let logits = nn::gpt(&mut g, &config);
        let layout = nn::batch_layout(&g);
        let targets = g.input("targets", &[self.batch, self.context], DType::I32, layout);
        let loss = g.cross_entropy(logits, targets);
        g.minimize(loss, AdamW { max_norm: self.max_norm, ..AdamW::default() });
        g
    }

    /// Returns the compiled training program.
    pub fn plan(&self, mesh: &str, options: &CompileOptions) -> Plan {
        compile(self.graph(mesh), options).unwrap_or_else(|e| panic!("mesh {mesh}: {e}"))
    }

    /// Starts a session.
    pub fn session(&self, mesh: &str, options: &CompileOptions) -> Session {
        self.session_with(mesh, options, &SessionOptions::default())
    }

    /// Starts a session with these options, for example as one process of several.
    pub fn session_with(&self, mesh: &str, options: &CompileOptions, session: &SessionOptions) -> Session {
        let plan = self.plan(mesh, options);
        Session::start(plan, session).unwrap_or_else(|e| panic!("mesh {mesh}: {e}"))
    }

    /// Returns the inputs of a step, with their names.
    pub fn batch(&self, step: u64) -> [(&'static str, HostTensor); 2] {
        let (_, train) = reference::tokens(TEXT.as_bytes());
        let (ids, targets) = reference::batch(&self.sizes(), &train, step as usize);
        let tensor = |values: Vec<usize>| {
            HostTensor::i32(&[self.batch, self.context], values.into_iter().map(|v| v as i32).collect())
        };
        [("ids", tensor(ids)), ("targets", tensor(targets))]
    }

    /// Runs the session's next step.
    pub fn step(&self, session: &mut Session) -> StepReport {
        let batch = self.batch(session.steps());
        session.step(&batch, LEARNING_RATE).unwrap_or_else(|e| panic!("step {}: {e}", session.steps()))
    }

    /// Trains from the initial weights for some steps.
    pub fn train(&self, mesh: &str, options: &CompileOptions, steps: usize) -> TrainingResult {
        self.train_with(mesh, options, steps, &SessionOptions::default())
    }

    /// Trains like [`Model::train`], with these session options.
    pub fn train_with(
        &self,
        mesh: &str,
        options: &CompileOptions,
        steps: usize,
        session: &SessionOptions,
    ) -> TrainingResult {
        let mut session = self.session_with(mesh, options, session);
        let reports: Vec<StepReport> = (0..steps).map(|_| self.step(&mut session)).collect();
        let losses = reports.iter().map(|r| r.loss.expect("the program has a loss")).collect();
        let norms = reports.iter().map(|r| r.grad_norm.expect("the program has gradients")).collect();
        let parameters = session.parameters().unwrap_or_else(|e| panic!("mesh {mesh}: {e}"));
        session.shutdown().unwrap_or_else(|e| panic!("mesh {mesh}: {e}"));
        TrainingResult { losses, norms, parameters }
    }
}

/// Result of a training.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingResult {
    /// Loss of each step, before its update.
    pub losses: Vec<f32>,
    /// For each step, the norm of all gradients together.
    pub norms: Vec<f64>,
    /// Whole parameter tensors after the last step.
    pub parameters: BTreeMap<String, HostTensor>,
}

impl TrainingResult {
    /// Returns the bits of all values, for an exact comparison of two trainings.
    pub fn bits(&self) -> (Vec<u32>, Vec<u64>, BTreeMap<&str, Vec<u32>>) {
        let losses = self.losses.iter().map(|l| l.to_bits()).collect();
        let norms = self.norms.iter().map(|n| n.to_bits()).collect();
        (losses, norms, bits(&self.parameters))
    }
}

/// Returns the bits of float tensors by name.
pub fn bits(tensors: &BTreeMap<String, HostTensor>) -> BTreeMap<&str, Vec<u32>> {
    let bits = |t: &HostTensor| t.as_f32().expect("floats").iter().map(|v| v.to_bits()).collect();
    tensors.iter().map(|(name, t)| (name.as_str(), bits(t))).collect()
}

/// Returns the vocabulary size of [`TEXT`].
pub fn vocabulary() -> usize {
    reference::tokens(TEXT.as_bytes()).0
}

/// Returns compile options with this number of micro-batches and this schedule.
pub fn options(micro_batches: usize, schedule: Schedule) -> CompileOptions {
    CompileOptions { micro_batches, schedule, ..CompileOptions::default() }
}

/// Returns `|a - b|` relative to the larger magnitude of the two.
pub fn relative(a: f64, b: f64) -> f64 {
    (a - b).abs() / a.abs().max(b.abs()).max(f64::MIN_POSITIVE)
}

/// Runs `work` on a new thread. Panics if `work` takes longer than `seconds`, so a test that hangs fails.
pub fn within<T: Send + 'static>(seconds: u64, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = channel();
    let thread = std::thread::spawn(move || {
        let _ = sender.send(work());
    });
    match receiver.recv_timeout(Duration::from_secs(seconds)) {
        Ok(value) => value,
        Err(RecvTimeoutError::Timeout) => panic!("the work is not done after {seconds} s"),
        Err(RecvTimeoutError::Disconnected) => match thread.join() {
            Err(cause) => std::panic::resume_unwind(cause),
            Ok(()) => unreachable!("the thread sends before it ends"),
        },
    }
}

/// A folder that is removed with its contents when this value is dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Creates an empty temporary folder of this name.
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("shardflow-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self(path)
    }

    /// Returns the folder's path.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
