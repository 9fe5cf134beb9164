//! What is learned: the trainable variables in order, by name, each once.
//!
//! Here belong finding and checking a model's variables, and exchanging their memory for a while. What is learned
//! about a variable, a mean or a state, belongs to the driver and the posteriors.

mod buffers;
mod perturbed;

pub(crate) use buffers::Buffers;
pub use perturbed::Perturbed;

use crate::{Error, Result, kernel};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch::nn::{VarStore, Variables};
use tch::{CModule, Device, Kind, Tensor};

/// The parameters of a model: ordered, named, grouped; variables that are the same tensor count once.
///
/// Built from a [`VarStore`] (its variables that were created trainable, in that order; later ones are picked up), from
/// named tensors ([`Params::named`]) or from a TorchScript module ([`Params::from_module`]). Wherever a function takes
/// `impl Into<Params>`, `&vs` will do. Kinds: f32, f64, bf16, f16; all on one device.
#[derive(Debug)]
pub struct Params {
    store: Option<Arc<Mutex<Variables>>>,
    /// Trainable variables of the store that have been looked at.
    seen: usize,
    leaves: Vec<Leaf>,
}

/// One parameter.
#[derive(Debug)]
pub struct Leaf {
    /// All names of the variable; more than one if it is tied.
    pub names: Vec<String>,
    pub tensor: Tensor,
    /// tch's `set_group`.
    pub group: usize,
    /// Where its noise starts: behind that of the parameters before it.
    noise_group: u64,
    kind: Kind,
    device: Device,
    size: Vec<i64>,
}

impl Leaf {
    fn new(names: Vec<String>, tensor: Tensor, group: usize) -> Self {
        let (kind, device, size) = (tensor.kind(), tensor.device(), tensor.size());
        Leaf { names, tensor, group, noise_group: 0, kind, device, size }
    }

    pub(crate) fn name(&self) -> &str {
        &self.names[0]
    }

    /// Frozen variables stay among the parameters and are passed over.
    pub(crate) fn trainable(&self) -> bool {
        self.tensor.requires_grad()
    }

    /// The kind of the mean and of the optimizer's state: f64 for f64 weights, otherwise f32.
    pub(crate) fn state_kind(&self) -> Kind {
        if self.kind == Kind::Double { Kind::Double } else { Kind::Float }
    }
}

fn lock(store: &Mutex<Variables>) -> MutexGuard<'_, Variables> {
    // Variables are only ever appended, so a panic elsewhere has left nothing half done.
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Params {
    /// Named tensors that require gradients, for example of a model that keeps no [`VarStore`]. All are in group 0.
    ///
    /// # Errors
    /// Two different tensors under one name; a tensor that is undefined or not a leaf.
    pub fn named<S: Into<String>>(tensors: impl IntoIterator<Item = (S, Tensor)>) -> Result<Self> {
        let mut params = Params { store: None, seen: 0, leaves: Vec::new() };
        for (name, tensor) in tensors {
            let name = name.into();
            if params.leaves.iter().any(|l| l.names.contains(&name)) {
                return Err(Error::parameter(&name, "two tensors have this name; give each its own"));
            }
            if !tensor.defined() {
                return Err(Error::parameter(&name, "the tensor is undefined"));
            }
            if tensor.requires_grad() && !tensor.is_leaf() {
                return Err(Error::parameter(&name, "it is the result of a computation; pass the leaf it comes from"));
            }
            // By memory and layout, not by handle: tch gives out many handles to one variable.
            match params.leaves.iter_mut().find(|l| l.tensor.is_set_to(&tensor)) {
                Some(leaf) => {
                    leaf.names.push(name);
                    leaf.names.sort();
                }
                None => params.push(Leaf::new(vec![name], tensor, 0)),
            }
        }
        Ok(params)
    }

    /// The parameters of a TorchScript module, by their names there. Its buffers are not listed.
    ///
    /// # Errors
    /// If libtorch cannot list them.
    pub fn from_module(module: &CModule) -> Result<Self> {
        Self::named(module.named_parameters()?)
    }

    /// Names in order, one per parameter.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.leaves.iter().map(Leaf::name)
    }

    /// Number of parameters (tensors).
    pub fn len(&self) -> usize {
        self.leaves.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }

    pub(crate) fn leaves(&self) -> &[Leaf] {
        &self.leaves
    }

    fn push(&mut self, mut leaf: Leaf) {
        // Frozen parameters count too, so that freezing one does not move the noise of those behind it.
        let end = |leaf: &Leaf| leaf.noise_group + kernel::groups(leaf.size.iter().product::<i64>() as usize);
        leaf.noise_group = self.leaves.last().map_or(0, end);
        self.leaves.push(leaf);
    }

    /// Position in the noise of parameter number `i`.
    pub(crate) fn noise_group(&self, i: usize) -> u64 {
        self.leaves[i].noise_group
    }

    /// The parameter of this name.
    pub(crate) fn find(&self, name: &str) -> Option<&Leaf> {
        self.leaves.iter().find(|l| l.names.iter().any(|n| n == name))
    }

    /// Appends the variables that were created since.
    pub(crate) fn refresh(&mut self) {
        let Some(store) = self.store.clone() else { return };
        let variables = lock(&store);
        // tch only ever appends to this list, so that its length tells whether there is anything new.
        if variables.trainable_variables.len() == self.seen {
            return;
        }
        // A variable carries no name; the store's names are found by the memory they point at.
        let mut by_memory: HashMap<usize, Vec<(&String, &Tensor)>> = HashMap::new();
        for (name, tensor) in &variables.named_variables {
            by_memory.entry(tensor.data_ptr() as usize).or_default().push((name, tensor));
        }
        for variable in &variables.trainable_variables[self.seen..] {
            let tensor = &variable.tensor;
            // An address alone is not enough: empty tensors may share one, and a view can start where its base does.
            let candidates = by_memory.get(&(tensor.data_ptr() as usize)).into_iter().flatten();
            let mut names: Vec<String> =
                candidates.filter(|(_, t)| t.is_set_to(tensor)).map(|(name, _)| (*name).clone()).collect();
            names.sort();
            // The store knows variables by name and by handle, in two lists that nothing forces to agree.
            if names.is_empty() {
                names.push(format!("unnamed.{}", self.leaves.len()));
            }
            match self.leaves.iter_mut().find(|l| l.tensor.is_set_to(tensor)) {
                // Tied; the name it has had so far stays the first.
                Some(leaf) => {
                    names.retain(|n| !leaf.names.contains(n));
                    leaf.names.append(&mut names);
                }
                None => self.push(Leaf::new(names, tensor.shallow_clone(), variable.group)),
            }
        }
        self.seen = variables.trainable_variables.len();
    }

    /// Errors unless there is something to train, on one device, unchanged in kind, device and shape since it was
    /// registered.
    pub(crate) fn check(&self) -> Result<()> {
        if self.leaves.is_empty() {
            return Err(Error::Parameters(
                "there are none; create the model's variables (layers) before the optimizer".to_owned(),
            ));
        }
        // The device of the first that is trained: the one that the gradients will be on.
        let Some(first) = self.leaves.iter().find(|l| l.trainable()) else {
            return Err(Error::Parameters(format!(
                "none of the {} requires gradients; call VarStore::unfreeze or set_requires_grad(true)",
                self.leaves.len()
            )));
        };
        for leaf in &self.leaves {
            let (kind, device) = (leaf.tensor.kind(), leaf.tensor.device());
            if device != first.device {
                return Err(Error::Parameters(format!(
                    "`{}` is on {:?} and `{}` on {device:?}; move all to one device",
                    first.name(),
                    first.device,
                    leaf.name(),
                )));
            }
            // `VarStore::set_kind` and `set_device` swap the memory under the same handle. The state would not
            // follow.
            if (kind, device) != (leaf.kind, leaf.device) {
                return Err(Error::parameter(
                    leaf.name(),
                    format!(
                        "it was {:?} on {:?} when the optimizer was built and is {kind:?} on {device:?} now; convert \
                         or move the model first and build the optimizer afterwards",
                        leaf.kind, leaf.device
                    ),
                ));
            }
            if leaf.tensor.size() != leaf.size {
                let (before, now) = (&leaf.size, leaf.tensor.size());
                return Err(Error::parameter(
                    leaf.name(),
                    format!(
                        "its shape was {before:?} when the optimizer was built and is {now:?} now; build the optimizer \
                         afterwards"
                    ),
                ));
            }
            if !matches!(kind, Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half) {
                return Err(Error::parameter(
                    leaf.name(),
                    format!("its kind is {kind:?}: expected f32, f64, bf16 or f16"),
                ));
            }
        }
        Ok(())
    }

    /// Errors if two parameters share some of their memory without being the same: a step would change it twice.
    pub(crate) fn check_overlap(&self) -> Result<()> {
        // Only those: the range of addresses of a strided tensor may hold weights of others without any overlap.
        let contiguous = self.leaves.iter().filter(|l| l.tensor.is_contiguous() && l.tensor.numel() > 0);
        let mut ranges: Vec<(usize, usize, &Leaf)> = contiguous
            .map(|l| {
                let start = l.tensor.data_ptr() as usize;
                (start, start + l.tensor.numel() * l.kind.elt_size_in_bytes(), l)
            })
            .collect();
        ranges.sort_by_key(|r| (r.0, r.1));
        // Sorted by their start, ranges overlap only if two neighbours do.
        ranges.windows(2).find(|w| w[1].0 < w[0].1).map_or(Ok(()), |w| {
            let (a, b) = (w[0].2.name(), w[1].2.name());
            Err(Error::Parameters(format!(
                "`{a}` and `{b}` share some of their memory; a parameter must be the whole tensor or have its own copy"
            )))
        })
    }

    /// Those that are trained, at their present values, in the kind of an optimizer's state.
    pub(crate) fn at_present(&self) -> Params {
        let _no_grad = tch::no_grad_guard();
        let trained = self.leaves.iter().filter(|l| l.trainable());
        let copies = trained.map(|l| {
            let value = l.tensor.detach().to_kind(l.state_kind()).contiguous();
            // `to_kind` and `contiguous` return the same memory where there is nothing to convert, and the copy must
            // not follow the weights.
            let value = if value.data_ptr() == l.tensor.data_ptr() { value.copy() } else { value };
            Leaf::new(l.names.clone(), value, l.group)
        });
        Params { store: None, seen: 0, leaves: copies.collect() }
    }

    /// The store's tensors that are not trained (batch-norm statistics), by name.
    pub(crate) fn buffers(&self) -> Vec<(String, Tensor)> {
        let Some(store) = &self.store else { return Vec::new() };
        let variables = lock(store);
        let trained = |t: &Tensor| self.leaves.iter().any(|l| l.tensor.is_set_to(t));
        let buffers = variables.named_variables.iter().filter(|(_, t)| !trained(t));
        buffers.map(|(name, t)| (name.clone(), t.shallow_clone())).collect()
    }
}

impl From<&VarStore> for Params {
    fn from(vs: &VarStore) -> Self {
        let mut params = Params { store: Some(vs.variables_.clone()), seen: 0, leaves: Vec::new() };
        params.refresh();
        params
    }
}

/// Another handle to the same variables.
impl From<&Params> for Params {
    fn from(params: &Params) -> Self {
        let share = |l: &Leaf| Leaf {
            names: l.names.clone(),
            tensor: l.tensor.shallow_clone(),
            group: l.group,
            noise_group: l.noise_group,
            kind: l.kind,
            device: l.device,
            size: l.size.clone(),
        };
        Params { store: params.store.clone(), seen: params.seen, leaves: params.leaves.iter().map(share).collect() }
    }
}

impl From<&mut VarStore> for Params {
    fn from(vs: &mut VarStore) -> Self {
        Params::from(&*vs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_gives_ordered_named_grouped_leaves_once() {
        let vs = VarStore::new(Device::Cpu);
        let a = vs.root().sub("z").zeros("weight", &[2]);
        let _ = vs.root().zeros_no_train("statistics", &[2]);
        let _ = vs.root().add("tied", a.shallow_clone(), true);
        let _ = vs.root().set_group(3).zeros("b", &[0]);
        let _ = vs.root().zeros("c", &[0]);
        let mut params = Params::from(&vs);
        assert_eq!(params.names().collect::<Vec<_>>(), ["tied", "b", "c"]);
        assert_eq!(params.leaves()[0].names, ["tied", "z.weight"]);
        assert_eq!(params.find("z.weight").unwrap().name(), "tied");
        assert_eq!(params.leaves().iter().map(|l| l.group).collect::<Vec<_>>(), [0, 3, 0]);
        assert_eq!(params.buffers().into_iter().map(|(n, _)| n).collect::<Vec<_>>(), ["statistics"]);
        let _ = vs.root().zeros("late", &[1]);
        let _ = vs.root().add("again", a, true);
        params.refresh();
        assert_eq!(params.names().collect::<Vec<_>>(), ["tied", "b", "c", "late"]);
        assert_eq!(params.leaves()[0].names, ["tied", "z.weight", "again"]);
    }

    #[test]
    fn unusable_parameters_are_refused() {
        let mut vs = VarStore::new(Device::Cpu);
        assert!(Params::from(&vs).check().unwrap_err().to_string().contains("there are none"));
        let w = vs.root().zeros("w", &[2]);
        let params = Params::from(&vs);
        vs.freeze();
        assert!(params.check().unwrap_err().to_string().contains("requires gradients"));
        vs.unfreeze();
        params.check().unwrap();
        vs.set_kind(Kind::Double);
        let changed = params.check().unwrap_err().to_string();
        assert!(changed.contains("`w`") && changed.contains("Double"), "{changed}");
        assert!(Params::named([("a", w.shallow_clone()), ("a", w.shallow_clone())]).is_err());
        assert!(Params::named([("a", &w * 2)]).is_err());
        let meta = Tensor::zeros([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        assert_eq!(Params::named([("x", meta.shallow_clone()), ("y", meta)]).unwrap().len(), 1);
        let whole = Tensor::zeros([4], (Kind::Float, Device::Cpu));
        let leaf = |start, length| whole.narrow(0, start, length).detach().set_requires_grad(true);
        Params::named([("a", leaf(0, 2)), ("b", leaf(2, 2))]).unwrap().check_overlap().unwrap();
        let shared = Params::named([("a", leaf(0, 3)), ("b", leaf(2, 2))]).unwrap().check_overlap().unwrap_err();
        assert!(shared.to_string().contains("`a` and `b`"), "{shared}");
    }
}
