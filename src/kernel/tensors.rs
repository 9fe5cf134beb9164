//! The elementwise computation by libtorch's operations: any device, any layout. On the CPU its arithmetic gives the
//! bits of the lanes; tanh and the normals agree to rounding.
//!
//! An operation costs a device a launch, whatever its size. So jobs that compute the same of different tensors are laid
//! end to end and computed as one: with settings that all parameters share, a step takes as many launches for a thousand
//! of them as for one.

use super::normal::{self, Run};
use super::trace::{Binary, Node, Program, Traced, Unary};
use super::{Draw, Field, groups};
use crate::Result;
use std::collections::HashMap;
use tch::{Device, Kind, Tensor};

/// Positions that are computed together, at most, unless one tensor has more: what lies between inputs and outputs
/// takes memory.
const TOGETHER: usize = 1 << 26;

/// What is between inputs and outputs.
#[derive(Debug)]
enum Value {
    /// Rounded to the kind of the computation.
    Number(f64),
    /// One-dimensional.
    Tensor(Tensor),
}

/// What jobs that are computed together have in common, beside the program: the device, numbers, and noise but for its
/// place.
type Shared = (Device, Vec<[u64; 3]>);

/// A result, and where it goes.
type Written<'a> = (Value, Vec<&'a Tensor>);

fn shared(job: &Traced) -> Shared {
    let constants = job.constants.iter().map(|x| [x.to_bits(), 0, 0]);
    let input = |x: &Field| match *x {
        Field::Number(x) => [x.to_bits(), 0, 0],
        Field::Tensor(_) => [0; 3],
        Field::Noise { seed, at } => [seed, at.step, at.sample],
    };
    (job.like().device(), constants.chain(job.inputs.iter().map(input)).collect())
}

pub(super) fn run(jobs: &[Traced]) -> Result<()> {
    let mut together: HashMap<(&Program, Shared), (usize, usize)> = HashMap::new();
    let mut all: Vec<Vec<&Traced>> = Vec::new();
    for job in jobs.iter().filter(|job| job.like().numel() > 0) {
        let n = job.like().numel();
        // A view of a tensor as one dimension is needed to write to it.
        if !job.tensors().all(|t| t.is_contiguous() && !t.is_neg() && t.device() == job.like().device()) {
            all.push(vec![job]);
            continue;
        }
        let (number, size) = together.entry((&job.program, shared(job))).or_insert((all.len(), 0));
        if *number == all.len() || *size + n > TOGETHER {
            (*number, *size) = (all.len(), 0);
            all.push(Vec::new());
        }
        *size += n;
        all[*number].push(job);
    }
    // Written only when all are computed, since a device may have no memory left; but for more than fit together.
    let (mut results, mut size): (Vec<Written>, usize) = (Vec::new(), 0);
    for jobs in &all {
        let n: usize = jobs.iter().map(|job| job.like().numel()).sum();
        if size + n > TOGETHER {
            std::mem::take(&mut results).into_iter().try_for_each(write)?;
            size = 0;
        }
        size += n;
        results.extend(computed(jobs)?);
    }
    results.into_iter().try_for_each(write)
}

/// The results of jobs of one program, with the same numbers and noise.
fn computed<'a>(jobs: &[&Traced<'a>]) -> Result<Vec<Written<'a>>> {
    let Program { graph, kind, .. } = &*jobs[0].program;
    let mut last = vec![0; graph.nodes.len()];
    for (i, node) in graph.nodes.iter().enumerate() {
        node.operands().for_each(|a| last[a as usize] = i);
    }
    graph.outputs.iter().flatten().for_each(|id| last[*id as usize] = usize::MAX);
    let mut values: Vec<Option<Value>> = Vec::with_capacity(graph.nodes.len());
    for (i, node) in graph.nodes.iter().enumerate() {
        let value = match *node {
            Node::Literal(bits) => Value::Number(rounded(*kind, f64::from_bits(bits))),
            Node::Constant(k) => Value::Number(rounded(*kind, jobs[0].constants[k as usize])),
            Node::Input(k) => input(jobs, k as usize, *kind)?,
            Node::Unary(op, a) => unary(op, at(&values, a), *kind)?,
            Node::Binary(op, a, b) => binary(op, at(&values, a), at(&values, b), *kind)?,
        };
        values.push(Some(value));
        // Memory that nobody needs any more.
        node.operands().filter(|a| last[*a as usize] == i).for_each(|a| values[a as usize] = None);
    }
    let mut results = Vec::new();
    for (o, id) in graph.outputs.iter().enumerate() {
        let Some(id) = id else { continue };
        let also = (0..jobs[0].also.len()).filter(|place| jobs[0].also[*place].0 == o);
        let also = also.map(|place| jobs.iter().map(|job| job.also[place].1).collect());
        let places = std::iter::once(jobs.iter().filter_map(|job| job.outputs[o]).collect()).chain(also);
        for to in places.collect::<Vec<Vec<&Tensor>>>() {
            results.push((in_kind(at(&values, *id), to[0].kind())?, to));
        }
    }
    Ok(results)
}

/// Rounded to the kind of an output.
fn in_kind(result: &Value, kind: Kind) -> Result<Value> {
    Ok(match result {
        Value::Number(x) => Value::Number(*x),
        Value::Tensor(t) if t.kind() == kind => Value::Tensor(t.shallow_clone()),
        Value::Tensor(t) => Value::Tensor(op(t.f_to_kind(kind))?),
    })
}

fn at(values: &[Option<Value>], id: u32) -> &Value {
    values[id as usize].as_ref().expect("kept until its last use")
}

/// An input of all jobs.
fn input(jobs: &[&Traced], i: usize, kind: Kind) -> Result<Value> {
    if let Some(Field::Number(x)) = jobs[0].inputs.get(i) {
        return Ok(Value::Number(rounded(kind, *x)));
    }
    let (mut all, mut places, mut source) = (Vec::new(), Vec::new(), None);
    for job in jobs {
        match job.inputs[i] {
            Field::Number(_) => {}
            Field::Tensor(t) => all.push(t.detach().f_reshape([-1])?),
            Field::Noise { seed, at } => {
                source = Some((seed, at));
                places.push((at.group, job.like().numel()));
            }
        }
    }
    if let Some((seed, at)) = source {
        all = noise(seed, at, &places, jobs[0].like())?;
    }
    // A copy also of a single one: its memory may be that of an output.
    let t = op(Tensor::f_cat(&all, 0))?;
    Ok(Value::Tensor(if t.kind() == kind { t } else { op(t.f_to_kind(kind))? }))
}

/// Normals for tensors whose noise begins at these groups, with their numbers of elements. Neighbours are drawn together.
fn noise(seed: u64, at: Draw, places: &[(u64, usize)], like: &Tensor) -> Result<Vec<Tensor>> {
    let mut runs: Vec<Run> = Vec::new();
    let mut starts = Vec::with_capacity(places.len());
    let mut drawn = 0;
    for (group, n) in places {
        starts.push(drawn);
        match runs.last_mut() {
            Some(run) if run.first + run.groups == *group => run.groups += groups(*n),
            _ => runs.push(Run { first: *group, groups: groups(*n) }),
        }
        drawn += groups(*n) * super::GROUP as u64;
    }
    let z = normal::normals(seed, at, &runs, like.device())?;
    Ok(starts.into_iter().zip(places).map(|(start, (_, n))| z.narrow(0, start as i64, *n as i64)).collect())
}

/// Writes a result of jobs to the tensors of each.
fn write((result, to): Written) -> Result<()> {
    let result = match result {
        Value::Number(x) => {
            return to.into_iter().try_for_each(|t| Ok(op(t.detach().f_copy_(&Tensor::from(x)))?));
        }
        Value::Tensor(t) => t,
    };
    if let [one] = to[..] {
        return Ok(op(one.detach().f_copy_(&result.f_reshape(one.size())?))?);
    }
    let sizes: Vec<i64> = to.iter().map(|t| t.numel() as i64).collect();
    let flat: Vec<Tensor> = to.iter().map(|t| t.detach().view(-1)).collect();
    // One launch on a device, where a copy for each would be one each.
    Ok(op(result.f_split_with_sizes_copy_out(&flat, sizes, 0))?)
}

/// Σ x² in f64. One number is read from the device for all of a kind that fit together.
pub(super) fn sum_of_squares(tensors: &[&Tensor]) -> Result<f64> {
    let mut together: Vec<(Kind, usize, Vec<Tensor>)> = Vec::new();
    for t in tensors {
        // Wider before it is squared: the square of 256 is already beyond the range of f16.
        let (kind, n) = (if t.kind() == Kind::Double { Kind::Double } else { Kind::Float }, t.numel());
        let flat = t.detach().f_reshape([-1])?;
        let fits = |(own, size, all): &&mut (Kind, usize, Vec<Tensor>)| {
            *own == kind && *size + n <= TOGETHER && all[0].kind() == t.kind() && all[0].device() == t.device()
        };
        match together.iter_mut().rev().find(fits) {
            Some((_, size, all)) => {
                *size += n;
                all.push(flat);
            }
            None => together.push((kind, n, vec![flat])),
        }
    }
    let sum = |(kind, _, all): (Kind, usize, Vec<Tensor>)| {
        let all = if let [one] = &all[..] { one.shallow_clone() } else { op(Tensor::f_cat(&all, 0))? };
        let wide = if all.kind() == kind { all } else { op(all.f_to_kind(kind))? };
        Ok(op(op(wide.f_square())?.f_sum(Kind::Double))?.f_double_value(&[])?)
    };
    together.into_iter().map(sum).sum()
}

fn rounded(kind: Kind, x: f64) -> f64 {
    if kind == Kind::Double { x } else { f64::from(x as f32) }
}

fn unary(f: Unary, x: &Value, kind: Kind) -> Result<Value> {
    Ok(match x {
        Value::Number(x) if kind == Kind::Double => Value::Number(f.of(*x)),
        Value::Number(x) => Value::Number(f64::from(f.of(*x as f32))),
        Value::Tensor(t) => Value::Tensor(op(match f {
            Unary::Neg => t.f_neg(),
            Unary::Sqrt => t.f_sqrt(),
            Unary::Abs => t.f_abs(),
            Unary::Tanh => t.f_tanh(),
        })?),
    })
}

fn binary(f: Binary, a: &Value, b: &Value, kind: Kind) -> Result<Value> {
    // A 0-dim tensor of the other operand's kind broadcasts and promotes nothing, and from the CPU it may meet any
    // device.
    let tensor = |x: &Value| match x {
        Value::Number(x) => Tensor::from(*x).to_kind(kind),
        Value::Tensor(t) => t.shallow_clone(),
    };
    if let (Value::Number(a), Value::Number(b)) = (a, b) {
        let y = if kind == Kind::Double { f.of(*a, *b) } else { f64::from(f.of(*a as f32, *b as f32)) };
        return Ok(Value::Number(y));
    }
    let (a, b) = (tensor(a), tensor(b));
    Ok(Value::Tensor(op(match f {
        Binary::Add => a.f_add(&b),
        Binary::Sub => a.f_sub(&b),
        Binary::Mul => a.f_mul(&b),
        Binary::Div => a.f_div(&b),
        // They pass a NaN on from either side, so that one in `a` stays.
        Binary::Min => a.f_minimum(&b),
        Binary::Max => a.f_maximum(&b),
    })?))
}

#[cfg(test)]
thread_local! {
    /// Operations of libtorch so far: what a device would launch.
    pub(super) static OPERATIONS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
    /// Whether memory of the CPU is to be treated as a device's that has no kernels.
    pub(super) static ONLY: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Marks an operation that a device would launch, to be counted in tests.
pub(super) fn op<T>(result: T) -> T {
    #[cfg(test)]
    OPERATIONS.set(OPERATIONS.get() + 1);
    result
}

#[cfg(test)]
mod tests {
    use super::super::{Elementwise, Job, Real};
    use super::*;

    /// m + z/√(h+δ), and a state that follows m.
    struct Moves;

    impl Elementwise for Moves {
        const OUTPUTS: usize = 2;
        fn eval<T: Real>(&self, _: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
            let (m, h, delta, z) = (read(0), read(1), read(2), read(3));
            write(0, m + z / (h + delta).sqrt());
            write(1, h + T::real(0.5) * (m * m - h));
        }
    }

    /// Means and states of `count` tensors after a pass, and the operations that it took.
    fn pass(count: usize, kind: Kind, run: impl Fn(Vec<Job<Moves>>)) -> (Vec<Tensor>, usize) {
        let size = |i: usize| [3 + i as i64 % 70, 2];
        let make = |i: usize, x: f64| Tensor::linspace(x, 2.0, size(i)[0] * 2, (kind, Device::Cpu)).reshape(size(i));
        let means: Vec<Tensor> = (0..count).map(|i| make(i, -1.0)).collect();
        let states: Vec<Tensor> = (0..count).map(|i| make(i, 0.5)).collect();
        let mut group = 0;
        let jobs = means.iter().zip(&states).enumerate().map(|(parameter, (m, h))| {
            let at = Draw { step: 5, sample: 1, parameter, group };
            // Every fourth one is frozen, say, and draws nothing.
            group += groups(m.numel()) + u64::from(parameter % 4 == 0);
            let inputs = [Field::Tensor(m), Field::Tensor(h), Field::Number(0.1), Field::Noise { seed: 3, at }];
            Job::new(Moves, inputs, [Some(m), Some(h)])
        });
        let jobs = jobs.collect();
        OPERATIONS.set(0);
        run(jobs);
        (means.into_iter().chain(states).collect(), OPERATIONS.get())
    }

    fn operations(jobs: Vec<Job<Moves>>) {
        let _no_grad = tch::no_grad_guard();
        run(&jobs.into_iter().map(|job| Traced::of(&job)).collect::<Vec<_>>()).unwrap();
    }

    /// Together they give what the lanes give of each; normals to rounding.
    #[test]
    fn tensors_laid_end_to_end_are_computed_as_each() {
        for (kind, tolerance) in [(Kind::Double, 1e-13), (Kind::Float, 3e-6)] {
            let ((flat, _), (lanes, none)) =
                (pass(9, kind, operations), pass(9, kind, |jobs| super::super::run(jobs).unwrap()));
            assert_eq!(none, 0);
            for (i, (a, b)) in flat.iter().zip(&lanes).enumerate() {
                let worst = (a - b).abs().max().double_value(&[]);
                assert!(worst < if i < 9 { tolerance } else { 1e-300 }, "{kind:?} tensor {i}: {worst:e}");
            }
        }
    }

    #[test]
    fn a_pass_over_many_tensors_takes_as_many_operations_as_over_few() {
        let count = |n| pass(n, Kind::Float, operations).1;
        // But for one range of counters for each gap between the tensors that draw.
        assert_eq!(count(8), count(7));
        let (some, many) = (count(62), count(1000));
        assert!(some < 140 && many - some == 1000_usize.div_ceil(4) - 62_usize.div_ceil(4), "{some} {many}");
    }

    /// The second job has other numbers, so that it is computed by itself, and tensors that libtorch refuses to add.
    #[test]
    fn a_job_that_fails_leaves_those_before_it_unwritten() {
        let [m, h, other] = [3, 3, 4].map(|n| Tensor::full([n], 1.0, (Kind::Float, Device::Cpu)));
        let job = |h, delta| {
            Job::new(
                Moves,
                [Field::Tensor(&m), Field::Tensor(h), Field::Number(delta), Field::Number(1.0)],
                [Some(&m), None],
            )
        };
        let _no_grad = tch::no_grad_guard();
        assert!(run(&[job(&h, 0.1), job(&other, 0.2)].map(|job| Traced::of(&job))).is_err());
        assert_eq!(m, h);
        run(&[Traced::of(&job(&h, 0.1))]).unwrap();
        assert_ne!(m, h);
    }

    /// Operations of a step of IVON, check included, with gradients given.
    fn step(count: usize) -> usize {
        let leaf = |i: usize| Tensor::full([3 + i as i64 % 70, 2], 0.5, (Kind::Float, Device::Cpu));
        let leaves: Vec<Tensor> = (0..count).map(|i| leaf(i).set_requires_grad(true)).collect();
        let named = leaves.iter().enumerate().map(|(i, t)| (format!("w{i:04}"), t.shallow_clone()));
        let params = crate::Params::named(named).unwrap();
        let ivon = crate::Ivon::default().ess(100.0);
        let mut opt = ivon.noise(crate::Philox { seed: 1 }).build(params, 0.1).unwrap();
        ONLY.set(true);
        for _ in 0..2 {
            // Counted is the second: the first also tries itself out.
            OPERATIONS.set(0);
            let gradients = leaves.iter().map(|t| Some(t.detach().copy())).collect();
            let given = crate::Derivatives { loss: 1.0, examples: None, gradients, squares: Vec::new() };
            opt.perturbed().unwrap().step(given).unwrap();
        }
        ONLY.set(false);
        OPERATIONS.get()
    }

    #[test]
    fn a_step_without_kernels_takes_few_operations() {
        let (some, many) = (step(62), step(1000));
        println!("{some} operations");
        assert!(some > 100 && some <= 400 && many == some, "{some} {many}");
    }

    #[test]
    fn halves_are_computed_in_single_precision() {
        let x = Tensor::from_slice(&[1.0_f32, 2.0, 3.0]).to_kind(Kind::BFloat16);
        let y = Tensor::from_slice(&[0.001_f32; 3]);
        let transposed = |t: &Tensor| t.reshape([3, 1]).expand([3, 2], false).tr().contiguous().tr();
        for layout in [Tensor::copy as fn(&Tensor) -> Tensor, transposed] {
            let (m, h, rounded) = (layout(&x), layout(&y), layout(&x));
            let inputs = [Field::Tensor(&m), Field::Tensor(&h), Field::Number(0.0), Field::Number(0.0)];
            let mut job = Job::new(Moves, inputs, [None, Some(&h)]);
            job.also.push((1, &rounded));
            super::super::run([job]).unwrap();
            let exact = layout(&(x.to_kind(Kind::Float).square() * 0.5 + 0.0005));
            assert!((&h - &exact).abs().max().double_value(&[]) < 1e-6);
            assert_eq!(rounded, h.to_kind(Kind::BFloat16));
        }
    }
}
