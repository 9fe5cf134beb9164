//! An elementwise computation written down: run once over numbers that record what happens to them, it gives the list of
//! its operations. What cannot run Rust over memory (libtorch's operations, a GPU) works from that list.
//!
//! A row cannot branch on a number, so one recording is all of it. Coefficients and inputs stay symbols: the list depends
//! on the row and on its settings, not on the step.

use super::{Also, Constants, Elementwise, Field, INPUTS, Inputs, Job, OUTPUTS, Outputs, Real, computed_in};
use arrayvec::ArrayVec;
use std::cell::RefCell;
use std::ops::{Add, Div, Mul, Neg, Sub};
use std::sync::Arc;
use tch::{Kind, Tensor};

/// Number of a node.
pub(super) type Id = u32;

/// An operation of one operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Unary {
    Neg,
    Sqrt,
    Abs,
    Tanh,
}

/// An operation of two operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    Min,
    Max,
}

/// A number of the computation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Node {
    /// A number that the computation brings along, as the bits of an f64; not yet rounded.
    Literal(u64),
    /// Number `i` of [`Elementwise::constants`].
    Constant(u8),
    Input(u8),
    Unary(Unary, Id),
    Binary(Binary, Id, Id),
}

impl Node {
    /// The nodes that it is computed from.
    pub(super) fn operands(self) -> impl Iterator<Item = Id> {
        let (a, b) = match self {
            Node::Literal(_) | Node::Constant(_) | Node::Input(_) => (None, None),
            Node::Unary(_, a) => (Some(a), None),
            Node::Binary(_, a, b) => (Some(a), Some(b)),
        };
        a.into_iter().chain(b)
    }
}

impl Unary {
    #[inline]
    pub(super) fn of<T: Real>(self, x: T) -> T {
        match self {
            Unary::Neg => -x,
            Unary::Sqrt => x.sqrt(),
            Unary::Abs => x.abs(),
            Unary::Tanh => x.tanh(),
        }
    }
}

impl Binary {
    #[inline]
    pub(super) fn of<T: Real>(self, a: T, b: T) -> T {
        match self {
            Binary::Add => a + b,
            Binary::Sub => a - b,
            Binary::Mul => a * b,
            Binary::Div => a / b,
            Binary::Min => a.min(b),
            Binary::Max => a.max(b),
        }
    }
}

/// The operations of a computation, each after those that it needs, and without those that no wanted output needs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Graph {
    pub nodes: Vec<Node>,
    /// The node of each output; `None` for one that nobody wants.
    pub outputs: Vec<Option<Id>>,
}

impl Graph {
    /// Records `f`, for the outputs that are `wanted`.
    pub(super) fn of<E: Elementwise>(f: &E, wanted: impl Fn(usize) -> bool) -> Self {
        let recorded = Graph::recorded(f, wanted);
        let graph = recorded.needed();
        // For the next recording.
        NODES.set(recorded.nodes);
        graph
    }

    /// Records `f`, for the outputs that are `wanted`; with all that it computes.
    fn recorded<E: Elementwise>(f: &E, wanted: impl Fn(usize) -> bool) -> Self {
        let mut all = NODES.take();
        all.clear();
        NODES.set(all);
        let constant = |i| push(Node::Constant(i as u8));
        let outputs = RefCell::new(vec![None; E::OUTPUTS]);
        f.eval(constant, |i| push(Node::Input(i as u8)), |o, Recorded(id)| outputs.borrow_mut()[o] = Some(id));
        let mut outputs = outputs.into_inner();
        for (o, output) in outputs.iter_mut().enumerate() {
            *output = output.filter(|_| wanted(o));
        }
        Graph { nodes: NODES.take(), outputs }
    }

    /// Without the nodes that no output needs.
    fn needed(&self) -> Self {
        let Graph { nodes: all, outputs } = self;
        let mut outputs = outputs.clone();
        let mut needed = vec![false; all.len()];
        outputs.iter().flatten().for_each(|id| needed[*id as usize] = true);
        // Backwards, since operands come before what is computed from them.
        for i in (0..all.len()).rev() {
            if needed[i] {
                all[i].operands().for_each(|a| needed[a as usize] = true);
            }
        }
        let mut new = vec![0; all.len()];
        let mut nodes = Vec::new();
        for (i, node) in all.iter().enumerate().filter(|(i, _)| needed[*i]) {
            let at = |id: Id| new[id as usize];
            nodes.push(match *node {
                Node::Unary(op, a) => Node::Unary(op, at(a)),
                Node::Binary(op, a, b) => Node::Binary(op, at(a), at(b)),
                leaf => leaf,
            });
            new[i] = nodes.len() as Id - 1;
        }
        outputs.iter_mut().flatten().for_each(|id| *id = new[*id as usize]);
        Graph { nodes, outputs }
    }
}

thread_local! {
    /// What is being recorded. [`Real::real`] has no place to take a recording from.
    static NODES: RefCell<Vec<Node>> = const { RefCell::new(Vec::new()) };
    /// A program as it was recorded last, and without what it does not need. That of the next parameter is mostly the
    /// same: to see that takes less time than to look for what is needed.
    static LAST: RefCell<Option<(Program, Arc<Program>)>> = const { RefCell::new(None) };
}

fn push(node: Node) -> Recorded {
    NODES.with_borrow_mut(|nodes| {
        nodes.push(node);
        Recorded(nodes.len() as Id - 1)
    })
}

/// A number that records what happens to it.
#[derive(Debug, Clone, Copy)]
struct Recorded(Id);

impl Recorded {
    fn unary(self, op: Unary) -> Self {
        push(Node::Unary(op, self.0))
    }
    fn binary(self, op: Binary, other: Self) -> Self {
        push(Node::Binary(op, self.0, other.0))
    }
}

macro_rules! operators {
    ($($operator:ident $name:ident)*) => {
        $(impl $operator for Recorded {
            type Output = Self;
            fn $name(self, other: Self) -> Self {
                self.binary(Binary::$operator, other)
            }
        })*
    };
}
operators!(Add add Sub sub Mul mul Div div);

impl Neg for Recorded {
    type Output = Self;
    fn neg(self) -> Self {
        self.unary(Unary::Neg)
    }
}

impl Real for Recorded {
    fn real(x: f64) -> Self {
        push(Node::Literal(x.to_bits()))
    }
    fn sqrt(self) -> Self {
        self.unary(Unary::Sqrt)
    }
    fn abs(self) -> Self {
        self.unary(Unary::Abs)
    }
    fn tanh(self) -> Self {
        self.unary(Unary::Tanh)
    }
    fn min(self, other: Self) -> Self {
        self.binary(Binary::Min, other)
    }
    fn max(self, other: Self) -> Self {
        self.binary(Binary::Max, other)
    }
}

/// What an input is to a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Form {
    /// One number for all positions of a tensor.
    Number,
    Tensor(Kind),
    Noise,
}

/// A computation without the tensors and numbers of a particular job: what a kernel is compiled from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Program {
    pub graph: Graph,
    /// What is computed in: f32 or f64; or what only moves, any one kind.
    pub kind: Kind,
    pub inputs: ArrayVec<Form, INPUTS>,
    /// Kinds of the outputs.
    pub outputs: ArrayVec<Option<Kind>, OUTPUTS>,
    /// Numbers of outputs that have a second place, and kinds there.
    pub also: ArrayVec<(usize, Kind), 2>,
}

impl Program {
    /// A recording as a program, which is the same place in memory as that of the recording before if they are equal.
    fn shared(recorded: Program) -> Arc<Program> {
        LAST.with_borrow_mut(|last| {
            let program = match last {
                Some((same, program)) if *same == recorded => program.clone(),
                _ => Arc::new(Program { graph: recorded.graph.needed(), ..recorded.clone() }),
            };
            // The other one's list serves for the next recording.
            if let Some((other, _)) = last.replace((recorded, program.clone())) {
                NODES.set(other.graph.nodes);
            }
            program
        })
    }
}

/// A job whose computation is data.
#[derive(Debug)]
pub(super) struct Traced<'a> {
    pub program: Arc<Program>,
    pub constants: Constants,
    pub inputs: Inputs<'a>,
    pub outputs: Outputs<'a>,
    pub also: Also<'a>,
}

impl<'a> Traced<'a> {
    pub(super) fn of<E: Elementwise>(job: &Job<'a, E>) -> Self {
        let kinds = job.tensors().map(|t| computed_in(t.kind()));
        let kind = kinds.reduce(|a, b| if b == Kind::Double { b } else { a }).expect("a job has an output");
        let Job { f, inputs, outputs, also } = job;
        let form = |x: &Field| match x {
            Field::Number(_) => Form::Number,
            Field::Tensor(t) => Form::Tensor(t.kind()),
            Field::Noise { .. } => Form::Noise,
        };
        let program = Program {
            graph: Graph::recorded(f, |o| outputs.get(o).is_some_and(Option::is_some)),
            kind,
            inputs: inputs.iter().map(form).collect(),
            outputs: outputs.iter().map(|t| t.map(Tensor::kind)).collect(),
            also: also.iter().map(|(o, t)| (*o, t.kind())).collect(),
        };
        let program = Program::shared(program);
        let (inputs, outputs, also) = (inputs.clone(), outputs.clone(), also.clone());
        Traced { program, constants: f.constants(), inputs, outputs, also }
    }

    /// The tensor whose positions are computed.
    pub(super) fn like(&self) -> &'a Tensor {
        self.outputs.iter().flatten().next().expect("a job has an output")
    }

    /// All that it reads or writes.
    pub(super) fn tensors(&self) -> impl Iterator<Item = &'a Tensor> {
        self.read().chain(self.written())
    }

    /// All that it reads.
    pub(super) fn read(&self) -> impl Iterator<Item = &'a Tensor> {
        super::read(&self.inputs)
    }

    /// All that it writes.
    pub(super) fn written(&self) -> impl Iterator<Item = &'a Tensor> {
        super::written(&self.outputs, &self.also)
    }
}
