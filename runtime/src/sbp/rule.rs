//! The factor rule of an op. It names the indices of all operands, and determines signatures and shapes.
//!
//! A rule is written like an einsum, `"btc,vc->btv"`: each letter is a **factor**, an index of the op's iteration
//! space. Along one mesh axis there are three kinds of signatures:
//! 1. One factor is split: operands with it are `Split` along its dim, and inputs without it are `Broadcast`. Outputs
//!    without it are `Partial`, because the op contracts the factor.
//! 2. All devices do the same work: all operands are `Broadcast`.
//! 3. A linear op maps terms to terms: some inputs and all outputs are `Partial(Sum)`; other inputs are `Broadcast`.

use std::fmt;

use shardflow_kernels::collective::ReduceOp;

use super::{NdSbp, Sbp};
use crate::layout_error::LayoutError;

/// The layouts of an op's operands, along one mesh axis (`Sbp`) or on a placement (`NdSbp`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Signature<Layout> {
    /// The layout of each input.
    pub inputs: Vec<Layout>,
    /// The layout of each output.
    pub outputs: Vec<Layout>,
}

/// The layouts of an op's operands on a placement.
pub type NdSignature = Signature<NdSbp>;

impl NdSignature {
    /// Every combination of one signature for each axis, except those that mix reductions in an operand. The last axis
    /// varies fastest. `counts` has the numbers of inputs and outputs.
    pub(crate) fn combinations(by_axis: &[Vec<Signature<Sbp>>], counts: (usize, usize)) -> Vec<Self> {
        let empty = |count: usize| vec![NdSbp(Vec::new()); count];
        let mut all = vec![Self { inputs: empty(counts.0), outputs: empty(counts.1) }];
        for signatures in by_axis {
            let extend = |(nd, signature): (&Self, &Signature<Sbp>)| {
                let along = |layouts: &[NdSbp], entries: &[Sbp]| {
                    let extended = |(sbp, entry): (&NdSbp, &Sbp)| NdSbp([&sbp.0[..], &[*entry]].concat());
                    layouts.iter().zip(entries).map(extended).collect()
                };
                Self { inputs: along(&nd.inputs, &signature.inputs), outputs: along(&nd.outputs, &signature.outputs) }
            };
            let pairs = all.iter().flat_map(|nd| signatures.iter().map(move |signature| (nd, signature)));
            all = pairs.map(extend).filter(|signature| !signature.mixes_reductions()).collect();
        }
        all
    }

    fn mixes_reductions(&self) -> bool {
        self.inputs.iter().chain(&self.outputs).any(NdSbp::mixes_reductions)
    }
}

impl fmt::Display for NdSignature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |all: &[NdSbp]| all.iter().map(NdSbp::to_string).collect::<Vec<_>>().join(", ");
        write!(f, "{} -> {}", list(&self.inputs), list(&self.outputs))
    }
}

/// The factor rule of an op; the module documentation defines it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    inputs: Vec<Vec<char>>,
    outputs: Vec<Vec<char>>,
    fixed: Vec<char>,
    reduce: Vec<(char, ReduceOp)>,
    linear: Vec<Vec<usize>>,
    sizes: Vec<(char, usize)>,
}

impl Rule {
    /// Parses `"btc,c->btc,bt,bt"`: inputs, arrow, outputs. An empty operand is a scalar, so `"bt->"` has one scalar
    /// output. For an op without inputs, use [`Rule::new`].
    ///
    /// # Errors
    /// Returns an error if there is no arrow. Also returns the errors of [`Rule::new`].
    pub fn parse(text: &str) -> Result<Self, LayoutError> {
        let no_arrow = || LayoutError::Rule { text: text.into(), why: "it has no arrow; write inputs->outputs".into() };
        let (inputs, outputs) = text.split_once("->").ok_or_else(no_arrow)?;
        let operands = |list| str::split(list, ',').map(str::trim).collect::<Vec<_>>();
        Self::new(&operands(inputs), &operands(outputs))
    }

    /// Builds a rule from the letters of each input and output.
    ///
    /// # Errors
    /// Returns an error if an operand contains anything but ASCII letters, or a letter twice.
    pub fn new(inputs: &[&str], outputs: &[&str]) -> Result<Self, LayoutError> {
        let letters = |operands: &[&str]| operands.iter().map(|o| o.chars().collect()).collect();
        let rule = Self {
            inputs: letters(inputs),
            outputs: letters(outputs),
            fixed: Vec::new(),
            reduce: Vec::new(),
            linear: Vec::new(),
            sizes: Vec::new(),
        };
        for operand in rule.inputs.iter().chain(&rule.outputs) {
            for (i, letter) in operand.iter().enumerate() {
                if !letter.is_ascii_alphabetic() {
                    return Err(rule.error(format!("{letter:?} is not a letter")));
                }
                if operand[..i].contains(letter) {
                    return Err(rule.error(format!("{letter} occurs twice in one operand")));
                }
            }
        }
        Ok(rule)
    }

    /// Marks factors that must not be split, because the op needs their whole extent, such as the channels of a norm.
    ///
    /// # Errors
    /// Returns an error if one of the letters is in no operand.
    pub fn fixed(mut self, letters: &str) -> Result<Self, LayoutError> {
        letters.chars().try_for_each(|letter| self.check_factor(letter))?;
        self.fixed.extend(letters.chars());
        Ok(self)
    }

    /// Sets the reduction that combines the terms if this contracted factor is split. The default is `Sum`.
    ///
    /// # Errors
    /// Returns an error if no operand has the letter.
    pub fn reduce(mut self, letter: char, op: ReduceOp) -> Result<Self, LayoutError> {
        self.check_factor(letter)?;
        self.reduce.push((letter, op));
        Ok(self)
    }

    /// Declares that the op is jointly linear in each of these sets of inputs. `[0]` means
    /// `f(x + x', y) = f(x, y) + f(x', y)`, and `[0, 1]` means `f(x + x', y + y') = f(x, y) + f(x', y')`.
    ///
    /// # Errors
    /// Returns an error if a set is empty or names an input that does not exist.
    pub fn linear(mut self, sets: &[&[usize]]) -> Result<Self, LayoutError> {
        for set in sets {
            if set.is_empty() || set.iter().any(|&i| i >= self.inputs.len()) {
                let count = self.inputs.len();
                return Err(self.error(format!("linear inputs {set:?}: expected one or more indices below {count}")));
            }
            self.linear.push(set.to_vec());
        }
        Ok(self)
    }

    /// Sets the size of a factor that no input has.
    ///
    /// # Errors
    /// Returns an error if no operand has the letter.
    pub fn size(mut self, letter: char, size: usize) -> Result<Self, LayoutError> {
        self.check_factor(letter)?;
        self.sizes.push((letter, size));
        Ok(self)
    }

    /// All factors, in order of first appearance, inputs first.
    pub fn factors(&self) -> Vec<char> {
        let mut factors = Vec::new();
        for &letter in self.inputs.iter().chain(&self.outputs).flatten() {
            if !factors.contains(&letter) {
                factors.push(letter);
            }
        }
        factors
    }

    /// Signatures along one axis, in this order: one for the split of each factor (by first appearance), the one with
    /// `Broadcast` everywhere, and the linear ones.
    pub fn signatures_1d(&self) -> Vec<Signature<Sbp>> {
        let may_split = self.factors().into_iter().filter(|f| !self.fixed.contains(f));
        let mut all: Vec<Signature<Sbp>> = may_split.map(|factor| self.split(factor)).collect();
        all.push(Signature {
            inputs: vec![Sbp::Broadcast; self.inputs.len()],
            outputs: vec![Sbp::Broadcast; self.outputs.len()],
        });
        let sum = Sbp::Partial(ReduceOp::Sum);
        all.extend(self.linear.iter().map(|set| Signature {
            inputs: (0..self.inputs.len()).map(|i| if set.contains(&i) { sum } else { Sbp::Broadcast }).collect(),
            outputs: vec![sum; self.outputs.len()],
        }));
        all
    }

    /// Output layouts along one axis for these input layouts; `None` if no signature has these inputs.
    pub fn output_layouts(&self, inputs: &[Sbp]) -> Option<Vec<Sbp>> {
        // This case comes first: if only outputs have a factor, the signature that splits this factor has the same
        // inputs.
        if inputs.iter().all(|sbp| *sbp == Sbp::Broadcast) {
            return Some(vec![Sbp::Broadcast; self.outputs.len()]);
        }
        self.signatures_1d().into_iter().find(|signature| signature.inputs == inputs).map(|signature| signature.outputs)
    }

    /// Signatures on a placement with `axes` axes: every combination of [`Rule::signatures_1d`], see
    /// `NdSignature::combinations`.
    pub fn signatures(&self, axes: usize) -> Vec<NdSignature> {
        NdSignature::combinations(&vec![self.signatures_1d(); axes], (self.inputs.len(), self.outputs.len()))
    }

    /// Infers the shapes of the outputs from those of the inputs (whole tensors, or the shards of one signature).
    ///
    /// # Errors
    /// Returns an error if the number of inputs, or of dims of an input, differs from the rule, two inputs have
    /// different sizes for a factor, or [`Rule::size`] is missing for a factor that only outputs have.
    pub fn infer_shapes(&self, inputs: &[impl AsRef<[usize]>]) -> Result<Vec<Vec<usize>>, LayoutError> {
        let rule = || self.to_string();
        if inputs.len() != self.inputs.len() {
            return Err(LayoutError::InputCount { rule: rule(), expected: self.inputs.len(), got: inputs.len() });
        }
        let given = self.sizes.iter().map(|&(factor, size)| (factor, size, "the rule".to_owned()));
        let mut sizes: Vec<(char, usize, String)> = given.collect();
        for (input, (operand, shape)) in self.inputs.iter().zip(inputs).enumerate() {
            let shape = shape.as_ref();
            if shape.len() != operand.len() {
                let operand = operand.iter().collect();
                return Err(LayoutError::Rank { rule: rule(), input, operand, shape: shape.to_vec() });
            }
            for (&factor, &size) in operand.iter().zip(shape) {
                match sizes.iter().find(|s| s.0 == factor) {
                    Some((_, other_size, other)) if *other_size != size => {
                        let (other, other_size) = (other.clone(), *other_size);
                        return Err(LayoutError::FactorSize { rule: rule(), factor, input, size, other, other_size });
                    }
                    Some(_) => {}
                    None => sizes.push((factor, size, format!("input {input}"))),
                }
            }
        }
        let size = |factor: &char| sizes.iter().find(|s| s.0 == *factor).map(|s| s.1).ok_or(*factor);
        let shape = |operand: &Vec<char>| operand.iter().map(size).collect::<Result<Vec<_>, _>>();
        let shapes = self.outputs.iter().map(shape).collect::<Result<_, _>>();
        shapes.map_err(|factor: char| {
            self.error(format!("factor {factor} is in no input; set its size with `Rule::size`"))
        })
    }

    fn split(&self, factor: char) -> Signature<Sbp> {
        let dim = |operand: &Vec<char>| operand.iter().position(|&f| f == factor);
        let reduction = self.reduce.iter().find(|r| r.0 == factor);
        let contracted = Sbp::Partial(reduction.map_or(ReduceOp::Sum, |r| r.1));
        Signature {
            inputs: self.inputs.iter().map(|o| dim(o).map_or(Sbp::Broadcast, Sbp::Split)).collect(),
            outputs: self.outputs.iter().map(|o| dim(o).map_or(contracted, Sbp::Split)).collect(),
        }
    }

    fn check_factor(&self, letter: char) -> Result<(), LayoutError> {
        if self.factors().contains(&letter) {
            Ok(())
        } else {
            Err(self.error(format!("no operand has factor {letter}")))
        }
    }

    fn error(&self, why: String) -> LayoutError {
        LayoutError::Rule { text: self.to_string(), why }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side =
            |operands: &[Vec<char>]| operands.iter().map(|o| o.iter().collect()).collect::<Vec<String>>().join(",");
        write!(f, "{}->{}", side(&self.inputs), side(&self.outputs))
    }
}

/// Guesses output shapes if a rule is invalid or does not fit its inputs, so that building can continue to the next
/// error. The extent of an index is its extent in the first input that contains the index, or 1 if no input does.
pub fn plausible_shapes(text: &str, inputs: &[&[usize]]) -> Vec<Vec<usize>> {
    let Some((operands, outputs)) = text.split_once("->") else {
        return vec![inputs.first().map_or(Vec::new(), |shape| shape.to_vec())];
    };
    let operands: Vec<&str> = operands.split(',').map(str::trim).collect();
    let extent = |letter: char| {
        let first = operands
            .iter()
            .zip(inputs)
            .find_map(|(operand, shape)| shape.get(operand.chars().position(|other| other == letter)?).copied());
        first.unwrap_or(1)
    };
    outputs.split(',').map(|output| output.trim().chars().map(extent).collect()).collect()
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn signatures(rule: &Rule) -> String {
        rule.signatures(1).iter().map(NdSignature::to_string).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn signatures_split_and_contract_factors_but_not_fixed_ones() {
        let rule = Rule::parse("btc,vc->btv").unwrap().linear(&[&[0], &[1]]).unwrap();
        expect![[r#"
            (S0), (B) -> (S0)
            (S1), (B) -> (S1)
            (S2), (S1) -> (P)
            (B), (S0) -> (S2)
            (B), (B) -> (B)
            (P), (B) -> (P)
            (B), (P) -> (P)"#]]
        .assert_eq(&signatures(&rule));
        assert_eq!(rule.signatures(2).len(), 49);
        assert_eq!(rule.signatures(2)[2].to_string(), "(S0, S2), (B, S1) -> (S0, P)");
        assert_eq!(rule.signatures(0)[0].to_string(), "(), () -> ()");
        let rule = Rule::parse("btc,c->btc,bt,bt").unwrap().fixed("c").unwrap();
        expect![[r#"
            (S0), (B) -> (S0), (S0), (S0)
            (S1), (B) -> (S1), (S1), (S1)
            (B), (B) -> (B), (B), (B)"#]]
        .assert_eq(&signatures(&rule));
        expect![[r#"
            (S0), (B) -> (S0)
            (S1), (B) -> (S1)
            (B), (S0) -> (P)
            (B), (S1) -> (S2)
            (B), (B) -> (B)"#]]
        .assert_eq(&signatures(&Rule::parse("bt,vc->btc").unwrap()));
    }

    #[test]
    fn signatures_have_the_rules_reduction_and_do_not_mix_reductions() {
        let max = Rule::parse("bv->b").unwrap().reduce('v', ReduceOp::Max).unwrap();
        assert_eq!(signatures(&max), "(S0) -> (S0)\n(S1) -> (Pmax)\n(B) -> (B)");
        let mixed = Rule::parse("bv->").unwrap().reduce('v', ReduceOp::Max).unwrap();
        let layouts: Vec<String> = mixed.signatures(2).iter().map(|s| s.outputs[0].to_string()).collect();
        assert!(layouts.contains(&"(Pmax, Pmax)".into()) && layouts.contains(&"(P, P)".into()));
        assert!(!layouts.contains(&"(P, Pmax)".into()) && !layouts.contains(&"(Pmax, P)".into()));
    }

    #[test]
    fn output_layouts_follow_from_input_layouts() {
        let rule = Rule::parse("btc,vc->btv").unwrap().linear(&[&[0], &[1]]).unwrap();
        let (b, sum) = (Sbp::Broadcast, Sbp::Partial(ReduceOp::Sum));
        for (inputs, output) in [
            ([Sbp::Split(0), b], Some(Sbp::Split(0))),
            ([Sbp::Split(2), Sbp::Split(1)], Some(sum)),
            ([b, Sbp::Split(0)], Some(Sbp::Split(2))),
            ([b, b], Some(b)),
            ([sum, b], Some(sum)),
            ([sum, sum], None),
            ([sum, Sbp::Split(0)], None),
            ([Sbp::Split(0), Sbp::Split(0)], None),
        ] {
            assert_eq!(rule.output_layouts(&inputs), output.map(|sbp| vec![sbp]), "{inputs:?}");
        }
        let made = Rule::parse("x->xy").unwrap();
        assert_eq!(made.output_layouts(&[b]), Some(vec![b]), "a factor that only outputs have is not split");
    }

    #[test]
    fn output_shapes_follow_from_input_shapes_and_mismatches_are_refused_with_the_numbers() {
        let rule = Rule::parse("btc,vc->btv").unwrap();
        assert_eq!(rule.infer_shapes(&[vec![2, 3, 4], vec![7, 4]]).unwrap(), [[2, 3, 7]]);
        let scalar = Rule::parse("bt,->").unwrap();
        assert_eq!(scalar.infer_shapes(&[&[2, 3][..], &[]]).unwrap(), [Vec::<usize>::new()]);
        let source = Rule::new(&[], &["ab"]).unwrap().size('a', 3).unwrap();
        assert!(source.infer_shapes(&[] as &[&[usize]]).unwrap_err().to_string().contains("factor b is in no input"));
        assert_eq!(source.size('b', 2).unwrap().infer_shapes(&[] as &[&[usize]]).unwrap(), [[3, 2]]);
        let text = |shapes: &[Vec<usize>]| rule.infer_shapes(shapes).unwrap_err().to_string();
        let sizes = "rule btc,vc->btv: factor c has size 5 in input 1, but size 4 in input 0";
        assert_eq!(text(&[vec![2, 3, 4], vec![7, 5]]), sizes);
        let error = text(&[vec![2, 3], vec![7, 5]]);
        assert_eq!(error, r#"rule btc,vc->btv: input 0 needs 3 dims ("btc"), got shape [2, 3]"#);
        assert_eq!(text(&[vec![2, 3, 4]]), "rule btc,vc->btv: expected 2 inputs, got 1");
        let error = Rule::parse("c->c").unwrap().infer_shapes(&[vec![2, 3]]).unwrap_err().to_string();
        assert_eq!(error, r#"rule c->c: input 0 needs 1 dim ("c"), got shape [2, 3]"#);
    }

    #[test]
    fn invalid_rules_are_refused() {
        for (text, why) in
            [("ab", "no arrow"), ("aa->a", "twice"), ("a1->a", "not a letter"), ("a->b->c", "not a letter")]
        {
            assert!(Rule::parse(text).unwrap_err().to_string().contains(why), "{text}");
        }
        let rule = || Rule::parse("ab->a").unwrap();
        assert!(rule().fixed("x").is_err() && rule().reduce('x', ReduceOp::Max).is_err());
        assert!(rule().linear(&[&[1]]).is_err() && rule().linear(&[&[]]).is_err() && rule().size('x', 1).is_err());
    }
}
