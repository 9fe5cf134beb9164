//! A program as CUDA C++.
//!
//! What differs between steps and tensors is read from the tables (`table.rs`), so that a source depends on a row and its
//! settings alone. Products and sums are never fused, and roots and quotients are rounded as IEEE 754 asks: the bits are
//! those of the lanes, but for tanh, which is the device's own.

use super::super::GROUP;
use super::super::squares::{SUMMED as PIECE, SUMS};
use super::super::trace::{Binary, Form, Node, Program, Unary};
use super::table::{Word, bits, words, written};
use super::{BLOCK, CHUNK};
use std::fmt::Write;
use tch::Kind;

/// How a source has to be compiled to give the bits of the CPU; NVRTC's names.
pub(super) const OPTIONS: [&str; 5] =
    ["--std=c++17", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false"];

/// In front of every kernel.
const PRELUDE: &str = include_str!("prelude.cu");
/// Positions of a thread in one round: those of one Philox counter.
const OWN: usize = 4;
/// Positions between them.
const APART: usize = GROUP / OWN;

/// Its name in memory.
fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Double => "double",
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float",
    }
}

/// The definitions in front of the prelude, and the prelude.
fn prelude(kinds: &[Kind], double: bool, noise: bool, tanh: bool) -> String {
    let parts = [
        ("DOUBLE", double),
        ("NOISE", noise),
        ("TANH", tanh),
        ("BFLOAT16", kinds.contains(&Kind::BFloat16)),
        ("FLOAT16", kinds.contains(&Kind::Half)),
    ];
    let defined = parts.iter().filter(|(_, is)| *is).map(|(name, _)| format!("#define {name}\n"));
    defined.chain([PRELUDE.to_owned()]).collect()
}

/// Whether each node is the same at all positions of a tensor.
fn uniform(Program { graph, inputs, .. }: &Program) -> Vec<bool> {
    let mut all: Vec<bool> = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let leaf = if let Node::Input(i) = node { inputs[usize::from(*i)] == Form::Number } else { true };
        all.push(leaf && node.operands().all(|a| all[a as usize]));
    }
    all
}

/// A node as an expression of those before it.
fn expression(node: Node, kind: Kind, inputs: &[Form]) -> String {
    match node {
        Node::Literal(x) => {
            let x = f64::from_bits(x);
            format!("of_bits(0x{:x}ull) /* {x:?} */", bits(kind, x))
        }
        Node::Constant(i) => format!("k{i}"),
        Node::Input(i) => match inputs[usize::from(i)] {
            Form::Number => format!("x{i}"),
            Form::Tensor(_) => format!("x{i}[l]"),
            Form::Noise => format!("x{i}[j + l]"),
        },
        Node::Unary(op, a) => match op {
            Unary::Neg => format!("-v{a}"),
            Unary::Sqrt => format!("root(v{a})"),
            Unary::Abs => format!("magnitude(v{a})"),
            Unary::Tanh => format!("hyperbolic(v{a})"),
        },
        Node::Binary(op, a, b) => match op {
            Binary::Add => format!("v{a} + v{b}"),
            Binary::Sub => format!("v{a} - v{b}"),
            Binary::Mul => format!("v{a} * v{b}"),
            Binary::Div => format!("v{a} / v{b}"),
            Binary::Min => format!("smaller(v{a}, v{b})"),
            Binary::Max => format!("larger(v{a}, v{b})"),
        },
    }
}

/// How many of a thread's positions are loaded before the first is computed: more keep the memory busy, as long as there
/// are registers for them.
fn together(loaded: usize, also: usize, kind: Kind) -> usize {
    match loaded + also {
        0..=4 if kind != Kind::Double => 4,
        0..=3 => 2,
        5..=8 if kind != Kind::Double && also == 0 => 2,
        _ => 1,
    }
}

/// What a kernel reads of its entry, which has these words: addresses and noise, and numbers.
fn declarations(Program { kind, inputs, outputs, also, .. }: &Program, list: &[Word]) -> (Vec<String>, Vec<String>) {
    let (mut declared, mut constant) = (Vec::new(), Vec::new());
    for (w, word) in list.iter().enumerate() {
        let pointer = |constant: &str, kind: Kind, name: &str| {
            let kind = self::name(kind);
            format!("{constant}{kind}* const {name} = ({constant}{kind}*)entry[{w}] + begin;")
        };
        let input = |i: u8| if let Form::Tensor(kind) = inputs[usize::from(i)] { kind } else { *kind };
        match *word {
            Word::Length => {}
            Word::Constant(i) => constant.push(format!("const real k{i} = of_bits(entry[{w}]);")),
            Word::Number(i) => constant.push(format!("const real x{i} = of_bits(entry[{w}]);")),
            Word::Input(i) => declared.push(pointer("const ", input(i), &format!("in{i}"))),
            Word::Seed(i) => declared.push(format!("const u64 seed{i} = entry[{w}];")),
            Word::Step(i) => declared.push(format!("const u64 step{i} = entry[{w}];")),
            Word::Sample(i) => declared.push(format!("const u64 sample{i} = entry[{w}];")),
            Word::Group(i) => declared.push(format!("const u64 group{i} = entry[{w}] + begin / {GROUP};")),
            Word::Output(o) => {
                declared.push(pointer("", outputs[usize::from(o)].unwrap_or(*kind), &format!("out{o}")));
            }
            Word::Also(i) => declared.push(pointer("", also[usize::from(i)].1, &format!("also{i}"))),
        }
    }
    (declared, constant)
}

/// The source of a program's kernel.
pub(super) fn source(program: &Program) -> String {
    let Program { graph, kind, inputs, outputs, also } = program;
    let list = words(program);
    let used = |i: &usize| list.contains(&Word::Input(*i as u8));
    let loaded: Vec<usize> = (0..inputs.len()).filter(used).collect();
    let read = loaded.iter().map(|i| if let Form::Tensor(kind) = inputs[*i] { kind } else { *kind });
    let kinds: Vec<Kind> =
        read.chain(outputs.iter().copied().flatten()).chain(also.iter().map(|(_, kind)| *kind)).collect();
    let noise: Vec<u8> = list.iter().filter_map(|w| if let Word::Seed(i) = w { Some(*i) } else { None }).collect();
    let tanh = graph.nodes.iter().any(|node| matches!(node, Node::Unary(Unary::Tanh, _)));

    let mut text = prelude(&kinds, *kind == Kind::Double, !noise.is_empty(), tanh);
    let mut line = |depth: usize, s: &str| {
        for _ in 0..depth {
            text.push_str("    ");
        }
        text.push_str(s);
        text.push('\n');
    };
    line(0, &format!("\n{}", head(list.len())));
    line(1, &format!("const u64 begin = (chunk & 0xFFFFFFFFull) * {CHUNK};"));
    line(1, &format!("const u32 end = entry[0] - begin < {CHUNK} ? (u32)(entry[0] - begin) : {CHUNK};"));
    let same = uniform(program);
    let value = |i: usize| format!("const real v{i} = {};", expression(graph.nodes[i], *kind, inputs));
    // What is the same at all positions: once. But f64 takes two registers, and there are not enough for all of it.
    let inside = *kind == Kind::Double;
    let (declared, constant) = declarations(program, &list);
    let constant: Vec<String> =
        constant.into_iter().chain((0..graph.nodes.len()).filter(|i| same[*i]).map(value)).collect();
    for s in &declared {
        line(1, s);
    }
    if !inside {
        for s in &constant {
            line(1, s);
        }
    }

    let step = BLOCK as usize * OWN;
    line(1, &format!("const u32 own = threadIdx.x % {APART};"));
    line(1, &format!("for (u32 first = threadIdx.x / {APART} * {GROUP} + own; first < end; first += {step}) {{"));
    for i in noise {
        line(2, &format!("real x{i}[{OWN}];"));
        line(2, &format!("normals(seed{i}, step{i}, sample{i}, group{i} + first / {GROUP}, own, x{i});"));
    }
    let t = together(loaded.len(), also.len(), *kind);
    line(0, "#pragma unroll");
    line(2, &format!("for (u32 j = 0; j < {OWN}; j += {t}) {{"));
    let each = [
        (0, "#pragma unroll".to_owned()),
        (3, format!("for (u32 l = 0; l < {t}; l++) {{")),
        (4, format!("const u32 i = first + {APART} * (j + l);")),
        (4, "if (i < end) {".to_owned()),
    ];
    if !loaded.is_empty() {
        let arrays: Vec<String> = loaded.iter().map(|i| format!("x{i}[{t}]")).collect();
        line(3, &format!("real {};", arrays.join(", ")));
        for (depth, s) in &each {
            line(*depth, s);
        }
        for i in &loaded {
            line(5, &format!("x{i}[l] = read(in{i}[i]);"));
        }
        line(4, "}");
        line(3, "}");
    }
    for (depth, s) in &each {
        line(*depth, s);
    }
    if inside {
        for s in &constant {
            line(5, s);
        }
    }
    (0..graph.nodes.len()).filter(|i| !same[*i]).for_each(|i| line(5, &value(i)));
    let mut store = |place: String, o: usize| {
        if let Some(id) = graph.outputs[o] {
            line(5, &format!("write({place}[i], v{id});"));
        }
    };
    written(program).for_each(|(o, _)| store(format!("out{o}"), o));
    also.iter().enumerate().for_each(|(i, (o, _))| store(format!("also{i}"), *o));
    for depth in (0..=4).rev() {
        line(depth, "}");
    }
    text
}

/// The first lines of a kernel: which block it is, and the entry of its tensor, of this many words.
fn head(words: usize) -> String {
    format!(
        "extern \"C\" __global__ void __launch_bounds__({BLOCK}) pass(const u64* chunks, const u64* entries) {{
    const u64 chunk = chunks[blockIdx.x];
    const u64* const entry = entries + (chunk >> 32) * {words};"
    )
}

/// Words of an entry of [`squares`]: where the elements are, how many, where the sums go, and the number of the first.
pub(super) const SQUARES: usize = 4;
/// Words of an entry of [`folded`]: where the sums are, how many, and where their sums go.
pub(super) const FOLDED: usize = 3;

/// The kernel of Σ x²: a warp has a piece, and a thread one of its sums, as in the lanes.
pub(super) fn squares(kind: Kind) -> String {
    let mut text = prelude(&[kind], kind == Kind::Double, false, false);
    let pieces = BLOCK as usize / SUMS;
    let kind = name(kind);
    _ = write!(
        text,
        "
{head}
    const u64 piece = (chunk & 0xFFFFFFFFull) * {pieces} + threadIdx.x / {SUMS};
    const u64 begin = piece * {PIECE};
    if (begin >= entry[1]) return;
    const u32 end = entry[1] - begin < {PIECE} ? (u32)(entry[1] - begin) : {PIECE};
    const {kind}* const x = (const {kind}*)entry[0] + begin;
    double sum = 0.0;
#pragma unroll 16
    for (u32 i = threadIdx.x % {SUMS}; i < end; i += {SUMS}) {{
        const double wide = (double)read(x[i]);
        sum += wide * wide;
    }}
    ((double*)entry[2])[(entry[3] + piece) * {SUMS} + threadIdx.x % {SUMS}] = sum;
}}
",
        head = head(SQUARES),
    );
    text
}

/// The kernel that adds the sums of each piece in order.
pub(super) fn folded() -> String {
    let mut text = prelude(&[], true, false, false);
    _ = write!(
        text,
        "
{head}
    const u64 piece = (chunk & 0xFFFFFFFFull) * {BLOCK} + threadIdx.x;
    if (piece >= entry[1]) return;
    const double* const sums = (const double*)entry[0] + piece * {SUMS};
    double sum = sums[0];
#pragma unroll
    for (u32 i = 1; i < {SUMS}; i++) sum += sums[i];
    ((double*)entry[2])[piece] = sum;
}}
",
        head = head(FOLDED),
    );
    text
}
