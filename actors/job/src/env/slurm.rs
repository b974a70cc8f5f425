//! Parses two of Slurm's formats: host lists and tasks per node.

const NODES_MAX: usize = 1 << 16;

/// Returns the first host of a list such as `node[01-03,7],other`, or a description of the syntax error.
pub fn first_host(list: &str) -> Result<String, &'static str> {
    let mut in_brackets = false;
    let ends_item = |c| {
        in_brackets = c == '[' || in_brackets && c != ']';
        c == ',' && !in_brackets
    };
    let hosts: Vec<String> = list.split(ends_item).map(first_of_item).collect::<Result<_, _>>()?;
    Ok(hosts.into_iter().next().unwrap_or_default())
}

/// Returns the first host of one list item, such as `rack[1-2]node[01-03,7]`.
fn first_of_item(item: &str) -> Result<String, &'static str> {
    let (mut host, mut rest) = (String::new(), item);
    while let Some((before, after)) = rest.split_once('[') {
        let (ranges, after) = after.split_once(']').ok_or("an unclosed bracket")?;
        if ranges.contains('[') {
            return Err("a nested bracket");
        }
        let lows = ranges.split(',').map(low_of_range).collect::<Result<Vec<_>, _>>()?;
        host.extend([before, lows[0]]);
        rest = after;
    }
    host += rest;
    let is_part = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    match host.bytes().find(|b| !is_part(*b)) {
        Some(b']') => Err("an unmatched closing bracket"),
        Some(_) => Err("an invalid character in a name"),
        None if host.is_empty() => Err("an empty name"),
        None => Ok(host),
    }
}

/// Returns `01` for `01-03` or `01`: the leading zeros are part of the host name.
fn low_of_range(range: &str) -> Result<&str, &'static str> {
    let number = |text: &str| match text.parse::<u64>() {
        Ok(value) if text.bytes().all(|b| b.is_ascii_digit()) => Ok(value),
        _ => Err("a range that is not NUMBER or NUMBER-NUMBER"),
    };
    let (low, high) = range.split_once('-').unwrap_or((range, range));
    if number(low)? > number(high)? {
        return Err("a range whose end is below its start");
    }
    Ok(low)
}

/// Returns the number of tasks per node, from a list such as `2(x3),1`. The error describes the expected form.
pub fn tasks_per_node(list: &str) -> Result<Vec<u32>, &'static str> {
    const FORM: &str = "must be a list such as 2(x3),1";
    let mut tasks = Vec::new();
    for item in list.split(',') {
        let (count, nodes) = match item.split_once("(x") {
            Some((count, nodes)) => (count, nodes.strip_suffix(')').ok_or(FORM)?),
            None => (item, "1"),
        };
        let (count, nodes): (u32, usize) = (count.parse().map_err(|_| FORM)?, nodes.parse().map_err(|_| FORM)?);
        if nodes == 0 || nodes > NODES_MAX - tasks.len() {
            return Err("must list 1 to 65536 nodes");
        }
        tasks.resize(tasks.len() + nodes, count);
    }
    Ok(tasks)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_host_is_found_and_malformed_lists_are_refused() {
        for (list, first) in [
            ("node1", "node1"),
            ("node[01-03,7],other", "node01"),
            ("node[7,01-03]", "node7"),
            ("other,node[1-2]", "other"),
            ("rack[2-3]n[009-010]-ib,x", "rack2n009-ib"),
            ("[1-3]", "1"),
            ("a.b-c_d", "a.b-c_d"),
        ] {
            assert_eq!(first_host(list).as_deref(), Ok(first), "{list}");
        }
        for bad in
            ["", ",", "a,", ",a", "a[", "a]", "a[1", "a[]", "a[1-]", "a[-1]", "a[2-1]", "a[[1]]", "a[1,]", "a[x]"]
        {
            assert!(first_host(bad).is_err(), "{bad}");
        }
        for bad in ["a b", "a;b", "ok,a[+1]", "ok,b[3-2]", "a[1-2-3]", "n\u{e4}", "a[99999999999999999999]"] {
            assert!(first_host(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn tasks_per_node_are_parsed_and_malformed_lists_are_refused() {
        assert_eq!(tasks_per_node("2(x3),1"), Ok(vec![2, 2, 2, 1]));
        assert_eq!(tasks_per_node("4"), Ok(vec![4]));
        for bad in ["", "x", "2(x", "2(x0)", "2(x3", "2,", "2(x65537)", "-1", "1(x65536),1"] {
            assert!(tasks_per_node(bad).is_err(), "{bad}");
        }
    }

    /// One item of a host list: each part is a text and the ranges after it (low, high minus low, width).
    type Item = Vec<(String, Vec<(u64, u64, usize)>)>;

    fn item() -> impl Strategy<Value = Item> {
        let range = (0u64..1000, 0u64..20, 1usize..5);
        prop::collection::vec(("[a-z][a-z0-9.-]{0,4}", prop::collection::vec(range, 0..4)), 1..3)
    }

    proptest! {
        #[test]
        fn the_first_host_of_any_list_is_found(items in prop::collection::vec(item(), 1..5)) {
            let format_item = |item: &Item| {
                item.iter().map(|(text, ranges)| {
                    let ranges: Vec<String> = ranges.iter().map(|(low, more, width)| match more {
                        0 => format!("{low:0width$}"),
                        more => format!("{low:0width$}-{:0width$}", low + more),
                    }).collect();
                    if ranges.is_empty() { text.clone() } else { format!("{text}[{}]", ranges.join(",")) }
                }).collect::<String>()
            };
            let list = items.iter().map(format_item).collect::<Vec<_>>().join(",");
            let first: String = items[0].iter().map(|(text, ranges)| match ranges.first() {
                Some((low, _, width)) => format!("{text}{low:0width$}"),
                None => text.clone(),
            }).collect();
            prop_assert_eq!(first_host(&list), Ok(first));
        }

        #[test]
        fn no_text_makes_the_parsers_panic(text in "[a0-9\\[\\],\\-(x)]{0,12}") {
            let _ = (first_host(&text), tasks_per_node(&text));
        }
    }
}
