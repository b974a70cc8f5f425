//! Generates text with a trained model, one token at a time. Each token is drawn from the model's distribution after
//! the last `context` tokens.

use std::collections::BTreeMap;

use shardflow::init::mix;
use shardflow::prelude::*;
use shardflow::session::bytes_alone;

/// Logits are divided by this before a token is drawn. A value below 1 makes likely tokens more likely.
const TEMPERATURE: f64 = 0.8;

/// Generates tokens with the forward pass of one model, on one device.
pub struct Sampler {
    plan: Plan,
    context: usize,
}

impl Sampler {
    /// Compiles the forward program of this model for one sequence at a time, in evaluation mode. `config.batch` and
    /// `config.dropout` are not used.
    ///
    /// # Errors
    /// Those of [`compile`].
    pub fn compile(config: &GptConfig, options: &CompileOptions) -> Result<Self, CompileError> {
        let mut g = Graph::new(&Mesh::new(&[("data", 1)]).expect("one axis of one device is a mesh"));
        let logits = nn::gpt(&mut g, &GptConfig { batch: 1, ..*config });
        g.output("logits", logits);
        let options = CompileOptions { mode: Some(Mode::Evaluation), ..options.clone() };
        Ok(Self { plan: compile(g, &options)?, context: config.context })
    }

    /// Returns the bytes that [`Sampler::run`] needs in addition to its argument `parameters`.
    pub fn bytes(&self) -> u64 {
        bytes_alone(&self.plan).saturating_add(loading_bytes(&self.plan))
    }

    /// Draws `count` tokens that follow `prompt`, which must hold at least one token. The same seed draws the same
    /// tokens.
    ///
    /// # Errors
    /// If the parameters are not this model's, or a kernel fails.
    pub fn run(
        self,
        parameters: &BTreeMap<String, HostTensor>,
        prompt: &[i32],
        count: usize,
        seed: u64,
    ) -> Result<Vec<i32>, SessionError> {
        // The sampler's metrics must not be added to those of the training.
        let options = SessionOptions { publishes_metrics: false, ..SessionOptions::default() };
        let mut session = Session::start(self.plan, &options)?;
        session.set_parameters(parameters)?;
        let mut tokens = prompt.to_vec();
        for drawn in 0..count {
            let window = &tokens[tokens.len().saturating_sub(self.context)..];
            // Attention is causal, so the padding after the last real token does not affect earlier positions.
            let mut ids = window.to_vec();
            ids.resize(self.context, 0);
            let report = session.step(&[("ids", HostTensor::i32(&[1, self.context], ids))], 0.0)?;
            let logits = report.outputs["logits"].as_f32().unwrap_or_default();
            let vocabulary = logits.len() / self.context;
            let row = window.len().saturating_sub(1) * vocabulary;
            tokens.push(draw(&logits[row..row + vocabulary], uniform(seed, drawn as u64)) as i32);
        }
        session.shutdown()?;
        Ok(tokens.split_off(prompt.len()))
    }
}

/// Returns the size in bytes of each parameter as a whole tensor.
fn parameter_bytes(plan: &Plan) -> impl Iterator<Item = u64> {
    plan.graph.parameters().into_iter().map(|v| 4 * plan.graph.shape(v).iter().product::<usize>() as u64)
}

fn largest_parameter_bytes(plan: &Plan) -> u64 {
    parameter_bytes(plan).max().unwrap_or(0)
}

/// Returns the bytes that a process needs besides its plan to load parameters from a file. At first this
/// memory holds a tensor of the file and the tensor's f32 copy; later, the f32 copy and one device's part.
pub fn loading_bytes(plan: &Plan) -> u64 {
    2 * largest_parameter_bytes(plan)
}

/// Returns the bytes that a process needs besides its plan to gather the parameters for a sampler and then to run it.
/// The end of the session releases `own_bytes` of the plan, and the sampler runs after that.
pub fn sampling_bytes(plan: &Plan, sampler: Option<&Sampler>, own_bytes: u64) -> u64 {
    // Memory for all devices' parts of a tensor, and for the whole tensor.
    let gathering = (plan.device_count() as u64 + 1) * largest_parameter_bytes(plan);
    let Some(sampler) = sampler else { return gathering };
    let parameters: u64 = parameter_bytes(plan).sum();
    parameters + gathering.max(sampler.bytes().saturating_sub(own_bytes))
}

/// Returns random number `index` of the sequence that `seed` determines, in `0 .. 1`.
fn uniform(seed: u64, index: u64) -> f64 {
    (mix(mix(seed).wrapping_add(index)) >> 11) as f64 / (1u64 << 53) as f64
}

/// Returns the token at which the running sum of the softmax of `logits / TEMPERATURE` exceeds `u` (in `0 .. 1`). A
/// diverged model can have NaN logits; they get probability 0.
fn draw(logits: &[f32], u: f64) -> usize {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: &f32| {
        let weight = (f64::from(logit - max) / TEMPERATURE).exp();
        if weight.is_nan() { 0.0 } else { weight }
    };
    let mut remaining = u * logits.iter().map(weight).sum::<f64>();
    for (token, logit) in logits.iter().enumerate() {
        remaining -= weight(logit);
        if remaining < 0.0 {
            return token;
        }
    }
    logits.len().saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_drawn_by_their_probability() {
        // At temperature 0.8 the probabilities are 0, 1/4 and 3/4.
        let logits = [f32::NEG_INFINITY, 0.0, 0.8 * 3f32.ln()];
        let tokens: Vec<usize> = [0.0, 0.24, 0.26, 0.99].iter().map(|u| draw(&logits, *u)).collect();
        assert_eq!(tokens, [1, 1, 2, 2]);
        let drawn = (0..4000).filter(|i| draw(&logits, uniform(7, *i)) == 1).count();
        assert!((900..1100).contains(&drawn), "token 1 was drawn {drawn} times of 4000, expected about 1000");
        assert_eq!(draw(&[f32::NAN, 1.0], 0.5), 1);
        assert!(draw(&[f32::NAN; 2], 0.5) < 2);
    }

    #[test]
    fn a_sampler_needs_the_parameters_and_what_the_training_does_not_release() {
        let config = GptConfig { vocabulary: 5, layers: 1, heads: 1, width: 4, context: 3, batch: 9, dropout: 0.5 };
        let sampler = Sampler::compile(&config, &CompileOptions::default()).unwrap();
        let plan = &sampler.plan;
        let (parameters, largest) = (parameter_bytes(plan).sum::<u64>(), largest_parameter_bytes(plan));
        assert!(parameters > largest && largest == 4 * 4 * 16, "bytes: {parameters} in all, largest {largest}");
        assert_eq!(sampling_bytes(plan, None, 0), 2 * largest);
        assert_eq!(sampling_bytes(plan, Some(&sampler), 0), parameters + sampler.bytes());
        assert_eq!(sampling_bytes(plan, Some(&sampler), u64::MAX), parameters + 2 * largest);
        assert!(sampler.bytes() > parameters && loading_bytes(plan) == 2 * largest);
    }

    #[test]
    fn tokens_depend_on_the_seed_and_the_last_context_tokens() {
        let config = GptConfig { vocabulary: 5, layers: 1, heads: 1, width: 4, context: 3, batch: 9, dropout: 0.5 };
        let run = |prompt: &[i32], seed| {
            let sampler = Sampler::compile(&config, &CompileOptions::default()).unwrap();
            assert!(sampler.plan.graph.nodes().iter().all(|node| node.name != "dropout"), "evaluation has no dropout");
            let names = sampler.plan.graph.parameters();
            let shapes = names.iter().map(|v| sampler.plan.graph.tensor(*v));
            let zeros = |i: &[usize]| HostTensor::f32(i, vec![0.0; i.iter().product()]);
            let parameters = shapes.map(|t| (t.name.clone(), zeros(&t.shape))).collect();
            sampler.run(&parameters, prompt, 8, seed).unwrap()
        };
        let drawn = run(&[1], 1);
        assert!(drawn.len() == 8 && drawn.iter().all(|t| (0..5).contains(t)), "{drawn:?}");
        assert_eq!(run(&[1], 1), drawn);
        assert_ne!(run(&[1], 2), drawn);
        // A model of zeros gives every token the same probability after any prompt, even one longer than the context.
        assert_eq!(run(&[1, 2, 3, 4], 1), drawn);
    }
}
