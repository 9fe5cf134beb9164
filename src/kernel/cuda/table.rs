//! What a kernel is told of the tensors that it runs over: 64-bit words in the device's memory.
//!
//! A tensor has an entry, whose words depend on the program: [`words`] lists them, `source.rs` prints how they are read
//! and [`Tables`] is filled, from the same list. A block is told by one further word which positions are its own.

use super::super::Field;
use super::super::trace::{Form, Node, Program, Traced};
use super::CHUNK;
use tch::{Kind, Tensor};

/// A word of an entry, with the number of the constant, input or output that it is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    /// Number of positions.
    Length,
    Constant(u8),
    /// An input that is one number.
    Number(u8),
    /// Where the elements of an input are.
    Input(u8),
    /// What is drawn, and the group that the tensor's normals begin with.
    Seed(u8),
    Step(u8),
    Sample(u8),
    Group(u8),
    /// Where an output goes.
    Output(u8),
    /// The second place of an output: the number of the place.
    Also(u8),
}

/// The words of an entry, in order. Of what the graph does not read there are none.
pub(super) fn words(program: &Program) -> Vec<Word> {
    let mut all = vec![Word::Length];
    for node in &program.graph.nodes {
        match *node {
            Node::Constant(i) => all.push(Word::Constant(i)),
            Node::Input(i) => match program.inputs[usize::from(i)] {
                Form::Number => all.push(Word::Number(i)),
                Form::Tensor(_) => all.push(Word::Input(i)),
                Form::Noise => all.extend([Word::Seed(i), Word::Step(i), Word::Sample(i), Word::Group(i)]),
            },
            _ => {}
        }
    }
    // A computation may read the same thing twice.
    let mut once = Vec::with_capacity(all.len());
    for word in all {
        if !once.contains(&word) {
            once.push(word);
        }
    }
    once.extend(written(program).map(|(o, _)| Word::Output(o as u8)));
    let also = program.also.iter().enumerate().filter(|(_, (o, _))| program.graph.outputs[*o].is_some());
    once.extend(also.map(|(i, _)| Word::Also(i as u8)));
    once
}

/// The outputs that are written, and their kinds.
pub(super) fn written(program: &Program) -> impl Iterator<Item = (usize, Kind)> {
    let wanted = program.outputs.iter().zip(&program.graph.outputs).enumerate();
    wanted.filter_map(|(o, (kind, node))| kind.filter(|_| node.is_some()).map(|kind| (o, kind)))
}

/// A number as a kernel of this kind reads it: rounded once.
pub(super) fn bits(kind: Kind, x: f64) -> u64 {
    if kind == Kind::Double { x.to_bits() } else { u64::from((x as f32).to_bits()) }
}

pub(super) fn address(t: &Tensor) -> u64 {
    t.data_ptr().addr() as u64
}

fn word(job: &Traced, word: Word) -> u64 {
    let input = |i: u8| &job.inputs[usize::from(i)];
    let of_tensor = |t: Option<&Tensor>| t.map_or(0, address);
    let draw = |i: u8| match input(i) {
        Field::Noise { seed, at } => [*seed, at.step, at.sample, at.group],
        _ => [0; 4],
    };
    match word {
        Word::Length => job.like().numel() as u64,
        Word::Constant(i) => bits(job.program.kind, job.constants[usize::from(i)]),
        Word::Number(i) => {
            if let Field::Number(x) = input(i) {
                bits(job.program.kind, *x)
            } else {
                0
            }
        }
        Word::Input(i) => of_tensor(if let Field::Tensor(t) = input(i) { Some(t) } else { None }),
        Word::Seed(i) => draw(i)[0],
        Word::Step(i) => draw(i)[1],
        Word::Sample(i) => draw(i)[2],
        Word::Group(i) => draw(i)[3],
        Word::Output(o) => of_tensor(job.outputs[usize::from(o)]),
        Word::Also(i) => address(job.also[usize::from(i)].1),
    }
}

/// The blocks of tensors of these lengths, `size` positions each: number of the entry, and of the block within it.
pub(super) fn chunks(lengths: impl Iterator<Item = usize>, size: usize) -> impl Iterator<Item = u64> {
    let of = move |(entry, n): (usize, usize)| (0..n.div_ceil(size) as u64).map(move |i| (entry as u64) << 32 | i);
    lengths.enumerate().flat_map(of)
}

/// Where a launch finds its tables, as numbers of words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub blocks: u32,
    pub chunks: usize,
    pub entries: usize,
}

/// The tables of all launches of a run, for one upload.
#[derive(Debug, Default)]
pub(super) struct Tables(pub Vec<u64>);

impl Tables {
    /// Adds those of one launch: a word for each block, then the entries.
    pub(super) fn add(&mut self, chunks: impl Iterator<Item = u64>, entries: impl Iterator<Item = u64>) -> Place {
        let first = self.0.len();
        self.0.extend(chunks);
        let middle = self.0.len();
        self.0.extend(entries);
        Place { blocks: (middle - first) as u32, chunks: first, entries: middle }
    }

    /// Adds those of a pass over jobs of one program; `None` if they have no elements.
    pub(super) fn pass(&mut self, jobs: &[&Traced]) -> Option<Place> {
        let jobs: Vec<&&Traced> = jobs.iter().filter(|job| job.like().numel() > 0).collect();
        let list = words(&jobs.first()?.program);
        let entries = jobs.iter().flat_map(|job| list.iter().map(|w| word(job, *w)));
        Some(self.add(chunks(jobs.iter().map(|job| job.like().numel()), CHUNK), entries))
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(size_of::<u64>() * self.0.len());
        self.0.iter().for_each(|word| bytes.extend_from_slice(&word.to_ne_bytes()));
        bytes
    }
}
