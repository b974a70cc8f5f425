//! The order in which reductions combine the members' values.
//!
//! The prime factors of the number of members, in ascending order, are the radices of the levels. At each level, every
//! `radix` consecutive values become one value: `((v[0] + v[1]) + ...) + v[radix - 1]`. One value remains after the last
//! level. So 4 members compute `(x[0] + x[1]) + (x[2] + x[3])`. The order is the same for all elements: it does not
//! depend on the position of an element in its tensor, or in a bucket of tensors.
//!
//! A member's digit at a level is the position of its value among the values that become one. The digits identify the
//! member, like the digits of a number in mixed radix. Members that differ only in their digit at one level can exchange
//! values at this level: Thakur, Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in
//! MPICH". At the first levels, these are near members, which often share a node.

/// One level of a reduction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Level {
    /// Distance between members that differ by 1 in their digits at this level.
    pub(crate) stride: usize,
    /// Number of values that become one.
    pub(crate) radix: usize,
}

impl Level {
    /// The digit of `member` at this level.
    pub(crate) fn digit(&self, member: usize) -> usize {
        member / self.stride % self.radix
    }

    /// The member that differs from `member` only at this level, where it has the digit `digit`.
    pub(crate) fn with_digit(&self, member: usize, digit: usize) -> usize {
        member - self.digit(member) * self.stride + digit * self.stride
    }
}

/// The levels of a reduction among `members` members. One member has no level.
pub(crate) fn levels(members: usize) -> Vec<Level> {
    let (mut levels, mut stride, mut radix) = (Vec::new(), 1, 2);
    while stride < members {
        let rest = members / stride;
        if rest.is_multiple_of(radix) {
            levels.push(Level { stride, radix });
            stride *= radix;
        } else if radix * radix > rest {
            radix = rest;
        } else {
            radix += 1;
        }
    }
    levels
}

/// For each member: how many times the two newest values on a stack become one, after the member's value was pushed.
/// The one value that remains at the end is the result.
pub(crate) fn stack_program(members: usize) -> Vec<usize> {
    let levels = levels(members);
    let combinations = |member: usize| {
        // Level l+1 follows a member if the member ends a group of values of level l.
        let ends = levels.iter().take_while(|level| level.digit(member) + 1 == level.radix).count();
        levels.iter().take(ends + 1).filter(|level| level.digit(member) > 0).count()
    };
    (0..members).map(combinations).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expression of a reduction by its definition.
    fn expression(members: usize) -> String {
        let mut values: Vec<String> = (0..members).map(|member| member.to_string()).collect();
        for Level { radix, .. } in levels(members) {
            let combined = |group: &[String]| group.iter().cloned().reduce(|a, b| format!("({a}+{b})"));
            values = values.chunks(radix).filter_map(combined).collect();
        }
        values.concat()
    }

    #[test]
    fn expressions_follow_the_prime_factors() {
        let expected = ["", "0", "(0+1)", "((0+1)+2)", "((0+1)+(2+3))", "((((0+1)+2)+3)+4)", "(((0+1)+(2+3))+(4+5))"];
        assert_eq!((0..7).map(expression).collect::<Vec<_>>(), expected);
        let radices = |members| levels(members).iter().map(|level| level.radix).collect::<Vec<_>>();
        assert_eq!(radices(384), [2, 2, 2, 2, 2, 2, 2, 3]);
        assert_eq!(radices(2 * 3 * 97), [2, 3, 97]);
    }

    #[test]
    fn levels_cover_all_members() {
        for members in 1..=64 {
            let levels = levels(members);
            assert_eq!(levels.iter().map(|level| level.radix).product::<usize>(), members);
            for member in 0..members {
                let number: usize = levels.iter().map(|level| level.digit(member) * level.stride).sum();
                assert_eq!(number, member);
                for level in &levels {
                    let peers = (0..level.radix).map(|digit| level.with_digit(member, digit));
                    assert!(peers.enumerate().all(|(digit, peer)| peer < members && level.digit(peer) == digit));
                }
            }
        }
    }

    #[test]
    fn the_stack_program_computes_the_expression() {
        for members in 1..=64 {
            let mut stack: Vec<String> = Vec::new();
            for (member, combinations) in stack_program(members).into_iter().enumerate() {
                stack.push(member.to_string());
                for _ in 0..combinations {
                    let (b, a) = (stack.pop().expect("two values"), stack.pop().expect("two values"));
                    stack.push(format!("({a}+{b})"));
                }
            }
            assert_eq!(stack, [expression(members)]);
        }
    }
}
