//! Compares the reference with numpy, with finite differences and with itself.

use super::*;

const TEXT: &[u8] = b"the quick brown fox jumps over the lazy dog while the cat sleeps in the sun";

/// Returns a tiny model. Its weights are large enough for every part of the model to affect the loss.
fn tiny() -> ReferenceConfig {
    ReferenceConfig { init_std: 0.3, ..ReferenceConfig::new(2, 2, 4, 4, 3) }
}

fn assert_close(got: f64, expected: f64, tolerance: f64, quantity: &str) {
    assert!((got - expected).abs() <= tolerance, "{quantity}: got {got}, expected {expected}");
}

/// The expected numbers come from a float64 forward pass in numpy. The numpy program computes gradients as fourth-order
/// central differences. AdamW uses these gradients for the later losses.
#[test]
fn values_match_numpy() {
    let (loss, gradients) = first_step(&tiny(), TEXT);
    assert_close(loss, 3.5714343413608827, 1e-12, "loss at step 0");
    let expected = [
        ("wte.weight", [-0.10113017697192342, 0.049543520200071946, -0.05704179690998086, 0.10862845367739145]),
        (
            "h.1.attn.q.weight",
            [0.0077713178292526655, -0.0032630415995142195, -0.013586322801980206, 0.009078046569281165],
        ),
        ("h.0.ln1.weight", [0.10758294387939552, -0.03777621675212413, 0.11734685532431102, 0.02578980647779024]),
    ];
    for (name, expected) in expected {
        for (got, expected) in gradients[name].iter().zip(expected) {
            assert_close(*got, expected, 1e-9, name);
        }
    }
    let norm = gradients.values().flatten().map(|g| g * g).sum::<f64>().sqrt();
    assert_close(norm, 2.026526873740818, 1e-8, "norm of the gradient");

    let expected = [3.5714343413608827, 3.3882587971784623, 3.3763501267686435, 3.6306190369930698];
    for (step, (got, expected)) in train(&tiny(), TEXT, 4).into_iter().zip(expected).enumerate() {
        assert_close(got, expected, 1e-7, &format!("loss at step {step}"));
    }
}

/// Checks every element of every gradient. The numpy values cover only a few elements.
#[test]
fn gradients_match_finite_differences() {
    let config = tiny();
    let (vocab, train) = tokens(TEXT);
    let (ids, targets) = batch(&config, &train, 1);
    let mut parameters = initial_parameters(&config, vocab);
    let (_, gradients) = loss_and_gradients(&config, &parameters, &ids, &targets);
    let names: Vec<String> = parameters.keys().cloned().collect();
    for name in names {
        for i in 0..parameters[&name].len() {
            let h = 1e-4;
            let mut loss_at = |offset: f64| {
                let values = parameters.get_mut(&name).expect("its own name");
                let old = values[i];
                values[i] += offset;
                let (loss, _) = loss_and_gradients(&config, &parameters, &ids, &targets);
                parameters.get_mut(&name).expect("its own name")[i] = old;
                loss
            };
            let (near, far) = (loss_at(h) - loss_at(-h), loss_at(2.0 * h) - loss_at(-2.0 * h));
            let expected = (8.0 * near - far) / (12.0 * h);
            // Layer norms of width 4 have a high curvature, so the error of the differences grows with the gradient.
            assert_close(gradients[&name][i], expected, 1e-8 * (1.0 + expected.abs()), &format!("{name}[{i}]"));
        }
    }
}

#[test]
fn training_reduces_the_loss() {
    // The text repeats one word, so five steps are enough to see the loss fall.
    let text = b"abcabcabcabc".repeat(20);
    let losses = train(&ReferenceConfig { lr: 1e-2, ..ReferenceConfig::new(1, 2, 8, 8, 4) }, &text, 5);
    assert!(losses.windows(2).all(|pair| pair[1] < pair[0]), "{losses:?}");
    assert_close(losses[0], 3f64.ln(), 0.05, "loss of the untrained model on three tokens");
}

/// The scale of a gradient affects AdamW's first steps only through eps. With a low maximum norm, eps matters more, and
/// the loss falls more slowly.
#[test]
fn clipping_scales_the_gradient() {
    let (config, text) = (ReferenceConfig::new(1, 2, 8, 8, 4), b"abcabcabcabc".repeat(20));
    let free = train(&config, &text, 3);
    let loose = train(&ReferenceConfig { max_norm: 1e6, ..config }, &text, 3);
    let tight = train(&ReferenceConfig { max_norm: 1e-7, ..config }, &text, 3);
    assert_eq!(free, loose);
    assert!(free[0] == tight[0] && free[2] < tight[2], "losses {free:?} unclipped, {tight:?} clipped");
}

#[test]
fn normal_cdf_matches_tables() {
    for (z, expected) in [
        (0.0, 0.5),
        (1.0, 0.841_344_746_068_542_9),
        (-2.5, 0.00620966532577613),
        (5.0, 0.999_999_713_348_428_1),
        (9.0, 1.0),
        (-9.0, 0.0),
    ] {
        assert_close(normal_cdf(z), expected, 1e-15, &format!("cdf({z})"));
    }
}

/// If the text is present, compares the loss with that of the PyTorch and numpy programs for this model.
#[test]
fn first_loss_on_tinyshakespeare() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/tinyshakespeare/input.txt");
    let Ok(text) = std::fs::read(&path) else {
        eprintln!("SKIPPED first_loss_on_tinyshakespeare: {} does not exist", path.display());
        return;
    };
    let (loss, _) = first_step(&ReferenceConfig::new(4, 4, 128, 64, 12), &text);
    assert_close(loss, 4.205543617428251, 1e-9, "loss at step 0");
}
