//! Rewrites preprocessed CUDA C++ into C++ for g++.
//!
//! The preprocessor keeps `__global__`, `__shared__` and `__launch_bounds__`, also in expansions of macros. This module
//! collects the kernels. It turns static shared memory into `static` variables, and dynamic shared memory into an alias
//! of the shim's array.

/// A kernel in a text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct KernelName {
    /// Name of the kernel.
    pub name: String,
    /// First argument of the kernel's launch bounds, as an expression.
    pub threads_max: Option<String>,
}

/// Returns the kernels and the rewritten text, to which a description of each kernel is appended.
pub fn rewrite(text: &str) -> Result<(String, Vec<KernelName>), String> {
    let tokens = tokens(text);
    let mut out = String::with_capacity(text.len() + 1024);
    let mut kernels: Vec<KernelName> = Vec::new();
    let mut in_dynamic = false;
    // Number of open brackets inside a declaration of static shared memory; `None` outside.
    let mut in_static: Option<u32> = None;
    let mut bounds = None;
    let mut at = 0;
    while at < tokens.len() {
        match tokens[at] {
            "__global__" => {
                if let Some(name) = kernel_name(&tokens[at + 1..])
                    && !kernels.iter().any(|k| k.name == name)
                {
                    let threads_max = bounds.take().or_else(|| bounds_in(&tokens[at + 1..]));
                    kernels.push(KernelName { name, threads_max });
                }
            }
            "__launch_bounds__" => {
                let (first, end) = bracketed(&tokens, at + 1).ok_or("__launch_bounds__ has no parentheses")?;
                // The bounds may also precede `__global__`.
                bounds = Some(first);
                at = end;
                if kernels.last().is_some_and(|k| k.threads_max == bounds) {
                    bounds = None;
                }
            }
            "__shared__" => {
                let before = tokens[..at].iter().rev().find(|t| !is_space(t)).copied();
                if is_dynamic(&tokens, at) {
                    in_dynamic = true;
                } else {
                    if before != Some("static") {
                        out.push_str("static");
                    }
                    in_static = Some(0);
                }
            }
            ";" if in_dynamic => {
                in_dynamic = false;
                out.push_str(" __asm__(\"software_cuda_dynamic_shared\");");
            }
            token => {
                if let Some(depth) = in_static {
                    in_static = static_part(token, depth, &mut out);
                }
                out.push_str(token);
            }
        }
        at += 1;
    }
    for kernel in &kernels {
        let name = &kernel.name;
        let threads = kernel.threads_max.as_deref().unwrap_or("0");
        out.push_str(&format!(
            "\nextern \"C\" {{ extern const software_cuda::Kernel software_cuda_kernel_{name}; }}\
             \nconst software_cuda::Kernel software_cuda_kernel_{name} = \
             software_cuda::Signature<decltype({name})>::describe<&{name}>({threads});\n"
        ));
    }
    Ok((out, kernels))
}

/// Adds ` = {}` to each variable of a declaration. Without a constant initialiser, g++ would place a guard variable in
/// shared memory for arrays of classes. Returns the number of open brackets, or `None` after the declaration.
fn static_part(token: &str, depth: u32, out: &mut String) -> Option<u32> {
    match token {
        "(" | "[" | "{" | "<" => return Some(depth + 1),
        ")" | "]" | "}" | ">" => return Some(depth.saturating_sub(1)),
        "=" => return None,
        "," | ";" if depth == 0 => out.push_str(" = {}"),
        _ => {}
    }
    (token != ";").then_some(depth)
}

fn is_space(token: &str) -> bool {
    token.trim().is_empty()
}

/// Whether this `__shared__` declares dynamic memory. Such a declaration has `extern` before or after the word.
fn is_dynamic(tokens: &[&str], at: usize) -> bool {
    let before = tokens[..at].iter().rev().take_while(|t| !matches!(**t, ";" | "{" | "}"));
    let after = tokens[at..].iter().take_while(|t| !matches!(**t, ";" | "=" | "["));
    before.chain(after).any(|t| *t == "extern")
}

/// Returns the kernel's name: the last identifier before the parameters, after `__global__` and attributes.
fn kernel_name(tokens: &[&str]) -> Option<String> {
    let mut at = 0;
    let mut last = None;
    while at < tokens.len() {
        match tokens[at] {
            "__attribute__" | "__launch_bounds__" | "alignas" => at = bracketed(tokens, at + 1)?.1,
            "(" => return last,
            ";" | "{" | "}" => return None,
            token if token.starts_with(|c: char| c.is_alphabetic() || c == '_') => last = Some(token.to_string()),
            _ => {}
        }
        at += 1;
    }
    None
}

fn bounds_in(tokens: &[&str]) -> Option<String> {
    let end = tokens.iter().position(|t| matches!(*t, ";" | "{"))?;
    let at = tokens[..end].iter().position(|t| *t == "__launch_bounds__")?;
    Some(bracketed(tokens, at + 1)?.0)
}

/// Returns the first expression in the parentheses that open at `at` or after spaces, and the index where they close.
fn bracketed(tokens: &[&str], at: usize) -> Option<(String, usize)> {
    let open = (at..tokens.len()).find(|i| !is_space(tokens[*i])).filter(|i| tokens[*i] == "(")?;
    let (mut depth, mut first, mut is_first) = (0, String::new(), true);
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match *token {
            "(" => depth += 1,
            ")" => depth -= 1,
            "," if depth == 1 => is_first = false,
            _ => {}
        }
        if depth == 0 {
            return Some((first.trim().to_string(), i));
        }
        if is_first && i > open {
            first.push_str(token);
        }
    }
    None
}

/// Splits a text into identifiers, literals, line markers and runs of spaces. Each other character is a separate token.
fn tokens(text: &str) -> Vec<&str> {
    let bytes = text.as_bytes();
    let is_name = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b >= 0x80;
    let mut tokens = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        let run = |from: usize, more: &dyn Fn(u8) -> bool| {
            bytes[from..].iter().position(|b| !more(*b)).map_or(bytes.len(), |n| from + n)
        };
        let is_line_start = at == 0 || bytes[at - 1] == b'\n';
        at = match bytes[at] {
            b'#' if is_line_start => run(at, &|b| b != b'\n'),
            b if is_name(b) => run(at, &is_name),
            b if b.is_ascii_whitespace() => {
                // A line end is a separate token, so that the next token can be recognised as a line marker.
                if b == b'\n' { at + 1 } else { run(at, &|b| b.is_ascii_whitespace() && b != b'\n') }
            }
            quote @ (b'"' | b'\'') => {
                let mut end = at + 1;
                while end < bytes.len() && bytes[end] != quote {
                    end += if bytes[end] == b'\\' { 2 } else { 1 };
                }
                (end + 1).min(bytes.len())
            }
            _ => at + 1,
        };
        tokens.push(&text[start..at]);
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, body: &str, kernels: &[(&str, Option<&str>)]) {
        let (out, found) = rewrite(text).unwrap();
        let found: Vec<_> = found.iter().map(|k| (k.name.as_str(), k.threads_max.as_deref())).collect();
        assert_eq!(found, kernels);
        let end = out.find("\nextern \"C\" {").unwrap_or(out.len());
        assert_eq!(&out[..end], body);
    }

    #[test]
    fn kernels_are_found() {
        check("extern \"C\" __global__ void f(int n) {}", "extern \"C\"  void f(int n) {}", &[("f", None)]);
        check(
            "__global__ void __launch_bounds__(N * (2), 3) g(float* p);",
            " void  g(float* p);",
            &[("g", Some("N * (2)"))],
        );
        check("__global__ __launch_bounds__ (64) void\nh (int a) {}", "  void\nh (int a) {}", &[("h", Some("64"))]);
        check("char* s = \"__global__ void f(\"; // x", "char* s = \"__global__ void f(\"; // x", &[]);
    }

    #[test]
    fn shared_memory_is_rewritten() {
        check("{ __shared__ float a[4], b[N][2]; f(); }", "{ static float a[4] = {}, b[N][2] = {}; f(); }", &[]);
        check("{ static __shared__ P<int, 2> a; }", "{ static  P<int, 2> a = {}; }", &[]);
        let alias = " __asm__(\"software_cuda_dynamic_shared\");";
        check("extern __shared__ float d[]; int x;", &format!("extern  float d[]{alias} int x;"), &[]);
        check(
            "{ extern __shared__ __attribute__((aligned(16))) char d[]; }",
            &format!("{{ extern  __attribute__((aligned(16))) char d[]{alias} }}"),
            &[],
        );
        check("__shared__ extern int d[];", &format!(" extern int d[]{alias}"), &[]);
    }
}
