//! What the tapped layers of one forward pass leave behind: the recorder, its tape, and the interface of the layers'
//! rules.

use crate::Result;
use crate::likelihood::Outputs;
use std::cell::RefCell;
use std::fmt::Debug;
use std::marker::PhantomData;
use tch::{Kind, Tensor};

thread_local! {
    // Of the thread, because a layer's `forward` has no argument through which a tape could be handed over.
    static RECORDER: RefCell<Option<Tape>> = const { RefCell::new(None) };
}

/// The taps of a forward pass, in order of execution.
///
/// It holds the graph of that pass through the outputs: drop it together with the loss.
#[derive(Debug, Default)]
pub(crate) struct Tape {
    taps: Vec<Tap>,
    noted: Vec<Noted>,
}

impl Tape {
    pub(crate) fn taps(&self) -> &[Tap] {
        &self.taps
    }

    /// The losses of [`crate::nn`] that have a graph.
    pub(crate) fn noted(&self) -> &[Noted] {
        &self.noted
    }
}

/// What one call of a loss of [`crate::nn`] leaves behind.
#[derive(Debug)]
pub(crate) struct Noted {
    /// What the losses were computed from.
    pub output: Outputs,
    /// ℓ `[B]`, for ∂L/∂ℓ: what the closure made of them.
    pub losses: Tensor,
    /// `[B]`, false for examples whose label says that they do not count; `None` if all do.
    pub counted: Option<Tensor>,
}

/// Records the tapped layers that this thread calls from now on.
///
/// A recording inside another one takes the taps for itself. However it ends, the outer one (or none) is in charge
/// again afterwards.
#[derive(Debug)]
pub(crate) struct Recording {
    outer: Option<Tape>,
    /// The recorder is the thread's.
    _not_send: PhantomData<*const ()>,
}

impl Recording {
    pub(crate) fn start() -> Self {
        // The outer tape is kept here and not in a stack, so that a recording that is dropped by a panic restores it,
        // too.
        Recording { outer: RECORDER.replace(Some(Tape::default())), _not_send: PhantomData }
    }

    pub(crate) fn finish(self) -> Tape {
        let tape = RECORDER.take().unwrap_or_default();
        // Explicitly, for the order: the tape is taken out before `drop` puts the outer one back.
        drop(self);
        tape
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        RECORDER.set(self.outer.take());
    }
}

/// One call of one layer: its output z and the parameters it used.
#[derive(Debug)]
pub(crate) struct Tap {
    /// z `[B, …]`, for ∂L/∂z.
    pub output: Tensor,
    pub uses: Vec<Use>,
}

/// A parameter in a tap, and how its per-example gradients follow from δ = ∂L/∂z.
#[derive(Debug)]
pub(crate) struct Use {
    pub parameter: Tensor,
    pub rule: Box<dyn Rule>,
}

/// The per-example gradients of one parameter of one layer call.
pub(crate) trait Rule: Debug + Send {
    /// Gᵢ for the examples `first..first + b`: `[b, …shape of the parameter]`, in the kind of `delta`.
    ///
    /// `delta`: the rows of δ that belong to these examples, `[b, …]`.
    fn gradients(&self, first: i64, delta: &Tensor) -> Result<Tensor>;

    /// Σᵢ Gᵢ² over all examples where that needs no Gᵢ; `delta`: all of δ, `[B, …]`.
    fn squares(&self, delta: &Tensor) -> Result<Option<Tensor>> {
        self.outer(delta)?.map(|outer| outer.squares(&delta.f_square()?)).transpose()
    }

    /// The vectors aᵢ if Gᵢ = δᵢ aᵢᵀ; `delta`: all of δ.
    fn outer(&self, _delta: &Tensor) -> Result<Option<Outer>> {
        Ok(None)
    }

    /// If Gᵢ = Σₜ δᵢₜ aᵢₜᵀ over positions t.
    fn matrix(&self) -> Option<&dyn Matrix> {
        None
    }

    /// Elements per example that [`Rule::gradients`] allocates beside its arguments and its result.
    fn scratch(&self) -> i64 {
        0
    }
}

/// The weight or bias of a layer that multiplies it with vectors aᵢₜ (a bias: with 1), at one or more positions t of an
/// example.
pub(crate) trait Matrix {
    /// a `[n, in]` at all n positions of the examples that `delta` has the rows of, from example `first` on.
    fn inputs(&self, first: i64, delta: &Tensor) -> Result<Tensor>;

    /// δ `[n, out]` at the same positions.
    fn outputs(&self, delta: &Tensor) -> Result<Tensor>;
}

/// Gᵢ = δᵢ aᵢᵀ, so that Gᵢ² = δᵢ² (aᵢ²)ᵀ elementwise and what is linear in Gᵢ or in Gᵢ² needs no Gᵢ.
#[derive(Debug)]
pub(crate) enum Outer {
    /// a `[B, in]`; Gᵢ is `[out, in]`.
    Input(Tensor),
    /// a = 1; Gᵢ is δᵢ itself.
    One,
}

impl Outer {
    /// Σᵢ Gᵢ
    pub(crate) fn total(&self, delta: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Outer::Input(a) => delta.f_reshape([a.size()[0], -1])?.f_tr()?.f_matmul(a)?,
            Outer::One => delta.f_sum_dim_intlist(0, false, None::<Kind>)?,
        })
    }

    /// Σᵢ Gᵢ² from δ²; the sum of the δ² of several backward passes gives the sum of their results.
    pub(crate) fn squares(&self, delta_squared: &Tensor) -> Result<Tensor> {
        match self {
            Outer::Input(a) => Outer::Input(a.f_square()?).total(delta_squared),
            Outer::One => self.total(delta_squared),
        }
    }

    /// W `[B, out]` (or one row for all) with Σ V ⊙ Gᵢ² = Σ Wᵢ ⊙ δᵢ², for V in the parameter's shape.
    pub(crate) fn spread(&self, v: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Outer::Input(a) => a.f_square()?.f_matmul(&v.f_tr()?)?,
            Outer::One => v.f_unsqueeze(0)?,
        })
    }
}

impl Tap {
    /// A tap to fill while a recording is on and `z` has a graph.
    pub(crate) fn of(z: &Tensor) -> Option<Tap> {
        let recording = RECORDER.with_borrow(Option::is_some);
        // Under `no_grad` there is no backward pass that a tap could serve.
        (recording && z.requires_grad()).then(|| Tap { output: z.shallow_clone(), uses: Vec::new() })
    }

    /// Notes that the layer used `parameter`, unless that is absent or frozen.
    pub(crate) fn uses(&mut self, parameter: Option<&Tensor>, rule: impl Rule + 'static) {
        if let Some(parameter) = parameter.filter(|p| p.requires_grad()) {
            self.uses.push(Use { parameter: parameter.shallow_clone(), rule: Box::new(rule) });
        }
    }

    /// Puts the tap on the tape and returns the tensor to hand to the caller in place of z.
    pub(crate) fn finish(self) -> Tensor {
        if self.uses.is_empty() {
            return self.output;
        }
        let handed_out = separate(&self.output);
        RECORDER.with_borrow_mut(|tape| {
            if let Some(tape) = tape {
                // In the order of the calls; the index is the name by which the curvature finds a tap's δ.
                tape.taps.push(self);
            }
        });
        handed_out
    }
}

/// Puts a loss on the tape while a recording is on, and returns the tensor to hand to the caller in place of its losses.
pub(crate) fn note(noted: Noted) -> Tensor {
    RECORDER.with_borrow_mut(|tape| match tape {
        // Under `no_grad`, or of an output that was cut off, it is for a log, or has a graph by its targets alone.
        Some(tape) if noted.losses.requires_grad() && noted.output.z.requires_grad() => {
            let handed_out = separate(&noted.losses);
            tape.noted.push(noted);
            handed_out
        }
        _ => noted.losses,
    })
}

/// The same memory as a tensor of its own: if the caller had x itself, or a view of it, an operation in place (`relu_`)
/// would make the recorded x stand for what comes after it.
fn separate(x: &Tensor) -> Tensor {
    x.internal_unsafe_view(x.size())
}

/// Which dimensions of a layer's output a parameter is indexed by.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Features {
    /// The last ones, that many.
    Last(usize),
    /// The second one.
    Channel,
}

impl Features {
    /// `[b, …]` → `[b, …features]`: the sum over positions within each example.
    pub(crate) fn sum_positions(self, x: &Tensor) -> Result<Tensor> {
        let rank = x.dim();
        let positions = match self {
            Features::Last(n) => 1..rank.saturating_sub(n),
            Features::Channel => 2..rank,
        };
        // A sum over no dimension is, in libtorch, the sum over all of them.
        if positions.is_empty() {
            return Ok(x.shallow_clone());
        }
        let dims: Vec<i64> = positions.map(|d| d as i64).collect();
        Ok(x.f_sum_dim_intlist(dims, false, None::<Kind>)?)
    }
}

/// z = … + b: Gᵢ = Σₜ δᵢₜ.
#[derive(Debug)]
pub(crate) struct Shift(pub Features);

impl Rule for Shift {
    fn gradients(&self, _first: i64, delta: &Tensor) -> Result<Tensor> {
        self.0.sum_positions(delta)
    }

    fn outer(&self, delta: &Tensor) -> Result<Option<Outer>> {
        // Only without positions: a sum over them comes before the square.
        Ok((delta.dim() == 2).then_some(Outer::One))
    }

    fn matrix(&self) -> Option<&dyn Matrix> {
        // A shift over several dimensions (layer normalization) is not the bias of a matrix.
        (!matches!(self.0, Features::Last(n) if n != 1)).then_some(self)
    }
}

/// The weight of the input 1.
impl Matrix for Shift {
    fn inputs(&self, _first: i64, delta: &Tensor) -> Result<Tensor> {
        // Counted from the outputs, which know where the positions are.
        let n = self.outputs(delta)?.size()[0];
        Ok(delta.f_new_ones([n, 1], (delta.kind(), delta.device()))?)
    }

    fn outputs(&self, delta: &Tensor) -> Result<Tensor> {
        let last = match self.0 {
            Features::Last(_) => delta.shallow_clone(),
            Features::Channel => delta.f_movedim_int(1, -1)?,
        };
        Ok(last.f_reshape([-1, last.size()[last.dim() - 1]])?)
    }
}

/// The rows of a recorded input that belong to `delta`, in its kind.
pub(crate) fn rows(input: &Tensor, first: i64, delta: &Tensor) -> Result<Tensor> {
    // In the kind of δ, which under mixed precision is not that of the input.
    Ok(input.f_narrow(0, first, delta.size()[0])?.f_totype(delta.kind())?)
}

/// Elements per example of a recorded input.
pub(crate) fn row_elements(input: &Tensor) -> i64 {
    input.size()[1..].iter().product()
}

#[cfg(test)]
impl Tape {
    /// Runs `f` inside a recording.
    pub(crate) fn record<R>(f: impl FnOnce() -> R) -> (R, Tape) {
        let recording = Recording::start();
        let result = f();
        (result, recording.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Linear, linear};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use tch::nn::{LinearConfig, Module, VarStore};
    use tch::{Device, no_grad_guard};

    fn layer() -> (VarStore, Linear, Tensor) {
        let vs = VarStore::new(Device::Cpu);
        let layer = linear(vs.root(), 3, 2, LinearConfig::default());
        (vs, layer, Tensor::randn([4, 3], (Kind::Float, Device::Cpu)))
    }

    fn recording() -> bool {
        RECORDER.with_borrow(Option::is_some)
    }

    #[test]
    fn records_only_inside_a_recording_with_gradients_on() {
        let (_vs, layer, x) = layer();
        let _ = layer.forward(&x);
        let (_, tape) = Tape::record(|| {
            let _guard = no_grad_guard();
            layer.forward(&x)
        });
        assert!(tape.taps().is_empty());
        let (plain, (tapped, tape)) = (layer.forward(&x), Tape::record(|| layer.forward(&x)));
        assert_eq!(plain, tapped);
        let [tap] = tape.taps() else { panic!("{tape:?}") };
        assert!(tap.uses[0].parameter.is_set_to(&layer.ws) && tap.uses.len() == 2);
        assert_eq!(tap.output.data_ptr(), tapped.data_ptr());
        assert!(!recording());
    }

    #[test]
    fn an_inner_recording_keeps_its_taps() {
        let (_vs, layer, x) = layer();
        let (inner, outer) = Tape::record(|| {
            let _ = layer.forward(&x);
            let (_, inner) = Tape::record(|| layer.forward(&layer.forward(&x).matmul(&layer.ws)));
            let _ = layer.forward(&x);
            inner
        });
        assert_eq!((inner.taps().len(), outer.taps().len()), (2, 2));
    }

    #[test]
    fn a_panic_puts_the_outer_recording_back() {
        let (_vs, layer, x) = layer();
        let fails = || {
            Tape::record(|| {
                let _ = layer.forward(&x);
                panic!("on purpose");
            })
        };
        assert!(catch_unwind(AssertUnwindSafe(fails)).is_err());
        assert!(!recording());
        let ((), tape) = Tape::record(|| {
            let _ = layer.forward(&x);
            assert!(catch_unwind(AssertUnwindSafe(fails)).is_err());
            let _ = layer.forward(&x);
        });
        assert_eq!(tape.taps().len(), 2);
    }

    #[test]
    fn another_thread_has_its_own_recorder() {
        let (_, tape) = Tape::record(|| {
            std::thread::spawn(|| {
                let (_vs, layer, x) = layer();
                let _ = layer.forward(&x);
                assert!(!recording());
            })
            .join()
        });
        assert!(tape.taps().is_empty());
    }
}
