//! Einsum subscripts that describe one matrix product.

use std::fmt;

use crate::error::{KernelError, Result};
use crate::op::{Einsum, GemmDims};

impl fmt::Display for Einsum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}->{}", self.a, self.b, self.out)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// The letter is in `a` and `out`.
    Row,
    /// The letter is in `b` and `out`.
    Column,
    /// The letter is in `a` and `b`.
    Summed,
}

impl Einsum {
    /// Parses subscripts such as `"btc,hdc->bthd"`: one ASCII letter per dim.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] if `text` is malformed, or if no single matrix product of the operands, as they are
    /// stored, computes the result. Each letter must be in exactly two terms. The letters that are in the same two
    /// terms form a group: they must be adjacent and in the same order in both terms.
    pub fn parse(text: &str) -> Result<Self> {
        let refused = |what: &str, expected: &str| KernelError::arguments("einsum", what, expected, text);
        let terms = text.split_once("->").and_then(|(ab, out)| Some((ab.split_once(',')?, out)));
        let ((a, b), out) = terms.ok_or_else(|| refused("subscripts", "a,b->out"))?;
        let einsum = Self { a: a.trim().to_owned(), b: b.trim().to_owned(), out: out.trim().to_owned() };
        for term in [&einsum.a, &einsum.b, &einsum.out] {
            let repeated = term.char_indices().any(|(i, letter)| term[..i].contains(letter));
            if repeated || !term.chars().all(|letter| letter.is_ascii_alphabetic()) {
                return Err(refused("subscripts", "letters, each at most once per term"));
            }
        }
        einsum.layout()?;
        Ok(einsum)
    }

    fn role(&self, letter: char) -> Option<Role> {
        match (self.a.contains(letter), self.b.contains(letter), self.out.contains(letter)) {
            (true, false, true) => Some(Role::Row),
            (false, true, true) => Some(Role::Column),
            (true, true, false) => Some(Role::Summed),
            _ => None,
        }
    }

    fn letters(&self, term: &str, role: Role) -> String {
        term.chars().filter(|&letter| self.role(letter) == Some(role)).collect()
    }

    /// Returns, for each of a, b and out, whether the matrix is stored transposed.
    fn layout(&self) -> Result<[bool; 3]> {
        let refused = |expected: &str| KernelError::arguments("einsum", "subscripts", expected, self.to_string());
        let terms = [&self.a, &self.b, &self.out];
        for letter in terms.iter().flat_map(|term| term.chars()) {
            let hint = match terms.iter().filter(|term| term.contains(letter)).count() {
                2 => continue,
                3 => " (an index in all three terms is a batch index, which needs a custom op)",
                _ => "",
            };
            return Err(refused(&format!("index {letter} in exactly two of the three terms{hint}")));
        }
        let mut transposed = [false; 3];
        for (flag, (term, (x, y))) in transposed.iter_mut().zip(terms.into_iter().zip(self.groups())) {
            // If one group is empty, both orders match: the matrix is a row or a column, and counts as not transposed.
            *flag = *term != format!("{x}{y}");
            if *flag && *term != format!("{y}{x}") {
                return Err(refused(&self.as_product()));
            }
        }
        Ok(transposed)
    }

    /// Each term's two groups of indices. Letters are in the order of `a` or, for columns, of `b`.
    fn groups(&self) -> [(String, String); 3] {
        let rows = self.letters(&self.a, Role::Row);
        let columns = self.letters(&self.b, Role::Column);
        let summed = self.letters(&self.a, Role::Summed);
        [(rows.clone(), summed.clone()), (summed, columns.clone()), (rows, columns)]
    }

    /// Describes the matrix product that the subscripts express, and lists valid subscripts for that product.
    fn as_product(&self) -> String {
        let groups = self.groups();
        let dims = |(x, y): &(String, String)| {
            let size = |group: &String| if group.is_empty() { "1".to_owned() } else { group.clone() };
            format!("[{}, {}]", size(x), size(y))
        };
        let [a, b, out] = [(&self.a, 0), (&self.b, 1), (&self.out, 2)].map(|(term, i)| {
            let (x, y) = &groups[i];
            if *term == format!("{y}{x}") { term.clone() } else { format!("{x}{y}") }
        });
        let (left, right) = (dims(&groups[0]), dims(&groups[1]));
        format!("{a},{b}->{out}, the matrix product of {left} and {right} with dims stored in this order")
    }

    /// The extent of a letter. If both operands have this letter, the two extents must agree.
    fn extent(&self, letter: char, a: &[usize], b: &[usize]) -> Result<usize> {
        let of = |term: &str, shape: &[usize]| term.find(letter).and_then(|i| shape.get(i).copied());
        match (of(&self.a, a), of(&self.b, b)) {
            (Some(x), Some(y)) if x != y => {
                let what = format!("extent of {letter} in {self}");
                Err(KernelError::arguments("einsum", &what, x.to_string(), y.to_string()))
            }
            (Some(x), _) | (None, Some(x)) => Ok(x),
            (None, None) => {
                Err(KernelError::arguments("einsum", "index", "an index of an operand", format!("{letter} in {self}")))
            }
        }
    }

    fn check_ranks(&self, a: &[usize], b: &[usize]) -> Result<()> {
        for (term, shape) in [(&self.a, a), (&self.b, b)] {
            if term.len() != shape.len() {
                let expected = format!("{} dims for {term} in {self}", term.len());
                return Err(KernelError::arguments("einsum", "shape", expected, format!("{shape:?}")));
            }
        }
        Ok(())
    }

    /// Returns the matrix product for operands of these shapes.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] if ranks or shared extents differ, or the subscripts are not one matrix product.
    pub fn gemm_dims(&self, a: &[usize], b: &[usize]) -> Result<GemmDims> {
        self.check_ranks(a, b)?;
        let [a_transposed, b_transposed, out_transposed] = self.layout()?;
        let size = |term: &str, role: Role| {
            self.letters(term, role).chars().try_fold(1, |product, l| Ok(product * self.extent(l, a, b)?))
        };
        Ok(GemmDims {
            m: size(&self.a, Role::Row)?,
            n: size(&self.b, Role::Column)?,
            k: size(&self.a, Role::Summed)?,
            a_transposed,
            b_transposed,
            out_transposed,
        })
    }

    /// Returns the shape of the result for operands of these shapes.
    ///
    /// # Errors
    /// As for [`Einsum::gemm_dims`].
    pub fn output_shape(&self, a: &[usize], b: &[usize]) -> Result<Vec<usize>> {
        self.check_ranks(a, b)?;
        self.out.chars().map(|letter| self.extent(letter, a, b)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_layers_and_their_gradients_are_matrix_products() {
        let check = |text: &str, a: &[usize], b: &[usize], out: &[usize], mnk: (usize, usize, usize), t: [bool; 3]| {
            let einsum = Einsum::parse(text).unwrap();
            assert_eq!(einsum.output_shape(a, b).unwrap(), out, "{text}");
            let dims = einsum.gemm_dims(a, b).unwrap();
            assert_eq!((dims.m, dims.n, dims.k), mnk, "{text}");
            assert_eq!([dims.a_transposed, dims.b_transposed, dims.out_transposed], t, "{text}");
        };
        check("btc,hdc->bthd", &[2, 3, 4], &[5, 6, 4], &[2, 3, 5, 6], (6, 30, 4), [false, true, false]);
        check("bthd,hdc->btc", &[2, 3, 5, 6], &[5, 6, 4], &[2, 3, 4], (6, 4, 30), [false, false, false]);
        check("bthd,btc->hdc", &[2, 3, 5, 6], &[2, 3, 4], &[5, 6, 4], (30, 4, 6), [true, false, false]);
        check("mk,kn->nm", &[2, 3], &[3, 5], &[5, 2], (2, 5, 3), [false, false, true]);
        check("c,c->", &[4], &[4], &[], (1, 1, 4), [false, false, false]);
        check("m,n->mn", &[4], &[3], &[4, 3], (4, 3, 1), [false, false, false]);
    }

    #[test]
    fn the_error_suggests_subscripts_that_move_no_data() {
        for (text, left, right, written) in [
            ("bckhw,ok->bcohw", "[bchw, k]", "[k, o]", "bchwk,ok->bchwo"),
            ("abc,cbd->ad", "[a, bc]", "[bc, d]", "abc,bcd->ad"),
            ("acb,cd->abd", "[ab, c]", "[c, d]", "abc,cd->abd"),
            ("ab,bcd->dac", "[a, b]", "[b, cd]", "ab,bcd->acd"),
            ("ab,bcd->dca", "[a, b]", "[b, cd]", "ab,bcd->acd"),
            ("aib,jkl->abijkl", "[aib, 1]", "[1, jkl]", "aib,jkl->aibjkl"),
        ] {
            let error = Einsum::parse(text).unwrap_err().to_string();
            let expected = format!("expected {written}, the matrix product of {left} and {right} with dims stored in");
            assert!(error.contains(&expected) && error.ends_with(&format!("got {text}")), "{error}");
            Einsum::parse(written).unwrap();
        }
        let error = Einsum::parse("bij,bjk->bik").unwrap_err().to_string();
        let hint = "index b in exactly two of the three terms (an index in all three terms is a batch";
        assert!(error.contains(hint), "{error}");
    }

    #[test]
    fn subscripts_that_are_not_one_product_are_rejected() {
        for text in
            ["ab,bc", "ab->ab", "aab,bc->ac", "abc,abd->acd", "acb,cd->abd", "abc,cbd->ad", "ab,bc->adc", "a1,1->a"]
        {
            assert!(matches!(Einsum::parse(text), Err(KernelError::Arguments { .. })), "{text}");
        }
        let einsum = Einsum::parse("ab,bc->ac").unwrap();
        assert!(einsum.gemm_dims(&[2, 3], &[4, 5]).is_err());
        assert!(einsum.gemm_dims(&[2], &[4, 5]).is_err());
    }
}
