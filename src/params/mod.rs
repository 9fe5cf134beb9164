//! What is learned: the trainable variables in order, by name, each once.
//!
//! Here belong finding and checking a model's variables, and holding them at other values for a while. What is learned
//! about a variable, a mean or a state, belongs to the driver and the posteriors.

mod buffers;
mod held;
mod memory;
mod perturbed;
mod store;
mod subset;

pub(crate) use buffers::Buffers;
pub(crate) use held::Claim;
pub(crate) use memory::Written;
pub use perturbed::Perturbed;

use crate::{Error, Result, kernel};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;
use store::Store;
use tch::nn::VarStore;
use tch::{CModule, Device, Kind, Tensor};

/// The parameters of a model: ordered, named, grouped; variables that are the same tensor count once.
///
/// Built from a [`VarStore`] (its variables that were created trainable, in that order; later ones are picked up), from
/// several ([`Params::of_stores`]), from named tensors ([`Params::named`]) or from a TorchScript module
/// ([`Params::from_module`]), or from some of those ([`Params::only`], [`Params::only_named`], [`Params::last_layer`]).
/// Wherever a function takes `impl Into<Params>`, `&vs` will do. Kinds: f32, f64, bf16, f16; all on one device.
#[derive(Debug)]
pub struct Params {
    stores: Vec<Store>,
    only: Vec<Only>,
    leaves: Vec<Leaf>,
    index: Index,
    /// Where the noise of the next one starts.
    noise_end: u64,
    /// How many of them are known to lie apart in memory.
    separate: usize,
}

/// Numbers of parameters, by what they are looked up by. Models have thousands.
#[derive(Debug, Clone, Default)]
struct Index {
    names: HashMap<String, usize>,
    places: HashMap<usize, Vec<usize>>,
}

/// Which names are parameters.
#[derive(Clone)]
struct Only(Arc<dyn Fn(&str) -> bool + Send + Sync>);

impl fmt::Debug for Only {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Only")
    }
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

    /// Where the noise of the next one may start.
    fn noise_end(&self) -> u64 {
        self.noise_group + kernel::groups(self.size.iter().product::<i64>() as usize)
    }

    /// The kind of the mean and of the optimizer's state: f64 for f64 weights, otherwise f32.
    pub(crate) fn state_kind(&self) -> Kind {
        if self.kind == Kind::Double { Kind::Double } else { Kind::Float }
    }
}

impl Params {
    /// Named tensors that require gradients, for example of a model that keeps no [`VarStore`], in the order of their
    /// names, whatever order they come in: that of a `HashMap`, such as [`VarStore::variables`], is another one in
    /// every run, and noise, files and lists of gradients go by the order ([`Params::names`]). All are in group 0.
    ///
    /// # Errors
    /// Two different tensors under one name; a tensor that is undefined or not a leaf.
    pub fn named<S: Into<String>>(tensors: impl IntoIterator<Item = (S, Tensor)>) -> Result<Self> {
        let mut params = Params::of(Vec::new());
        let mut tensors: Vec<(String, Tensor)> = tensors.into_iter().map(|(name, t)| (name.into(), t)).collect();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, tensor) in tensors {
            if params.find(&name).is_some() {
                return Err(Error::parameter(&name, "two tensors have this name; give each its own"));
            }
            if !tensor.defined() {
                return Err(Error::parameter(&name, "the tensor is undefined"));
            }
            memory::check_layout(&name, &tensor)?;
            if tensor.requires_grad() && !tensor.is_leaf() {
                return Err(Error::parameter(&name, "it is the result of a computation; pass the leaf it comes from"));
            }
            // By memory and layout, not by handle: tch gives out many handles to one variable.
            match params.of_memory(&tensor) {
                Some(i) => params.tie(i, vec![name]),
                None => params.push(Leaf::new(vec![name], tensor, 0)),
            }
        }
        Ok(params)
    }

    fn of(stores: Vec<Store>) -> Self {
        let mut params =
            Params { stores, only: Vec::new(), leaves: Vec::new(), index: Index::default(), noise_end: 0, separate: 0 };
        params.refresh();
        params
    }

    /// The parameters of several stores, each under a name of its own: `weight` of the store `actor` is `actor.weight`.
    /// One optimizer then trains all of them, with one posterior and one checkpoint.
    ///
    /// ```
    /// # use tch::{Device, nn};
    /// use tch_blr::{Adam, Params};
    /// # fn main() -> tch_blr::Result<()> {
    /// # let (actor, critic) = (nn::VarStore::new(Device::Cpu), nn::VarStore::new(Device::Cpu));
    /// # let _nets = [&actor, &critic].map(|vs| nn::linear(vs.root(), 4, 2, Default::default()));
    /// let params = Params::of_stores([("actor", &actor), ("critic", &critic)])?;
    /// assert!(params.names().any(|name| name == "critic.weight"));
    /// let opt = Adam::default().build(params, 1e-3)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A name that is empty, given twice, or another one with a dot and more behind it: two variables could then have
    /// the same name.
    pub fn of_stores<'a, S: Into<String>>(stores: impl IntoIterator<Item = (S, &'a VarStore)>) -> Result<Self> {
        let of = |(name, vs): (S, &VarStore)| Store::new(vs, name.into() + ".");
        let stores: Vec<Store> = stores.into_iter().map(of).collect();
        for (i, a) in stores.iter().enumerate() {
            let clashes = |(j, b): (usize, &Store)| i != j && b.prefix.starts_with(&a.prefix);
            if a.prefix == "." || stores.iter().enumerate().any(clashes) {
                let name = a.prefix.trim_end_matches('.');
                let problem =
                    format!("the store `{name}` needs a name of its own, which none of the others begins with");
                return Err(Error::Parameters(problem));
            }
        }
        Ok(Params::of(stores))
    }

    /// Those parameters whose name passes, for example one of two networks in a store. Variables that are created later
    /// are asked as well; of a tied variable it is enough if one of its names passes.
    ///
    /// ```
    /// # use tch::{Device, nn};
    /// use tch_blr::{Adam, Ivon, Params};
    /// # fn main() -> tch_blr::Result<()> {
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let _nets = ["body", "head"].map(|name| nn::linear(vs.root() / name, 4, 2, Default::default()));
    /// let head = |name: &str| name.starts_with("head.");
    /// let certain = Adam::default().build(Params::from(&vs).only(move |name| !head(name)), 1e-3)?;
    /// let uncertain = Ivon::default().ess(1000.0).build(Params::from(&vs).only(head), 0.1)?;
    /// # assert_eq!((certain.params().len(), uncertain.params().len()), (2, 2));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn only(mut self, keep: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        let leaves = std::mem::take(&mut self.leaves);
        (self.index, self.noise_end) = (Index::default(), 0);
        self.only.push(Only(Arc::new(keep)));
        // Anew, because the places in the noise follow from the parameters before.
        for leaf in leaves {
            self.push(leaf);
        }
        self
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
        if !self.only.iter().all(|Only(keep)| leaf.names.iter().any(|name| keep(name))) {
            return;
        }
        // Frozen parameters count too, so that freezing one does not move the noise of those behind it.
        leaf.noise_group = self.noise_end;
        self.noise_end = leaf.noise_end();
        let i = self.leaves.len();
        self.index.places.entry(memory::address(&leaf.tensor)).or_default().push(i);
        self.index.names.extend(leaf.names.iter().map(|name| (name.clone(), i)));
        self.leaves.push(leaf);
    }

    /// The number of the parameter that is this tensor.
    fn of_memory(&self, t: &Tensor) -> Option<usize> {
        // An address alone is not enough: empty tensors may share one, and a view can start where its base does.
        let there = self.index.places.get(&memory::address(t))?;
        there.iter().copied().find(|i| memory::is_same(&self.leaves[*i].tensor, t))
    }

    /// The name of the parameter that is this tensor.
    pub(crate) fn name_of(&self, t: &Tensor) -> Option<&str> {
        self.of_memory(t).map(|i| self.leaves[i].name())
    }

    /// Gives a parameter further names.
    fn tie(&mut self, i: usize, names: Vec<String>) {
        self.index.names.extend(names.iter().map(|name| (name.clone(), i)));
        self.leaves[i].names.extend(names);
    }

    /// Position in the noise of parameter number `i`.
    pub(crate) fn noise_group(&self, i: usize) -> u64 {
        self.leaves[i].noise_group
    }

    /// The number of the parameter of this name.
    pub(crate) fn number(&self, name: &str) -> Option<usize> {
        self.index.names.get(name).copied()
    }

    /// Positions in the noise of those that pass, by name.
    pub(crate) fn noise_groups(&self, passes: impl Fn(usize, &Leaf) -> bool) -> BTreeMap<String, u64> {
        let all = self.leaves.iter().enumerate().filter(|(i, leaf)| passes(*i, leaf));
        all.map(|(_, leaf)| (leaf.name().to_owned(), leaf.noise_group)).collect()
    }

    /// Takes over positions that parameters of these names had elsewhere; those of others are behind all of them.
    pub(crate) fn set_noise_groups(&mut self, groups: &BTreeMap<String, u64>) {
        let of = |leaf: &Leaf| leaf.names.iter().find_map(|name| groups.get(name)).copied();
        let known: Vec<Option<u64>> = self.leaves.iter().map(of).collect();
        for (leaf, group) in self.leaves.iter_mut().zip(&known) {
            leaf.noise_group = group.unwrap_or(0);
        }
        let mut end =
            self.leaves.iter().zip(&known).filter(|(_, group)| group.is_some()).map(|(l, _)| l.noise_end()).max();
        for (leaf, _) in self.leaves.iter_mut().zip(&known).filter(|(_, group)| group.is_none()) {
            leaf.noise_group = end.unwrap_or(0);
            end = Some(leaf.noise_end());
        }
        self.noise_end = end.unwrap_or(0);
    }

    /// The parameter of this name.
    pub(crate) fn find(&self, name: &str) -> Option<&Leaf> {
        self.number(name).map(|i| &self.leaves[i])
    }

    /// Appends the variables that were created since.
    pub(crate) fn refresh(&mut self) {
        // All of them before the first is asked about: `only` may look into the store, whose lock is not re-entrant.
        let new: Vec<(String, Leaf)> = self.stores.iter_mut().flat_map(Store::new_variables).collect();
        for (prefix, mut leaf) in new {
            // The store knows variables by name and by handle, in two lists that nothing forces to agree.
            if leaf.names.is_empty() {
                leaf.names.push(format!("{prefix}unnamed.{}", self.leaves.len()));
            }
            match self.of_memory(&leaf.tensor) {
                // Tied; the name it has had so far stays the first.
                Some(i) => {
                    leaf.names.retain(|n| !self.leaves[i].names.contains(n));
                    self.tie(i, leaf.names);
                }
                None => self.push(leaf),
            }
        }
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
        let mut present = Params::of(Vec::new());
        copies.for_each(|leaf| present.push(leaf));
        present
    }

    /// Errors if a guard holds one of them, so that it is not at its own values.
    pub(crate) fn check_free(&self) -> Result<()> {
        held::check_free(self.leaves.iter().map(|leaf| (leaf.name(), &leaf.tensor)))
    }

    /// Errors if a guard holds one of them, and keeps them from being perturbed or updated by others as long as the
    /// result lives.
    pub(crate) fn claim(&self) -> Result<Claim> {
        let all = self.leaves.iter().filter(|leaf| leaf.tensor.numel() > 0);
        Claim::new(all.map(|leaf| (leaf.name(), &leaf.tensor)))
    }

    /// The stores' tensors that are no weights (batch-norm statistics), in the order of their names.
    pub(crate) fn buffers(&self) -> Vec<(String, Tensor)> {
        let mut all: Vec<(String, Tensor)> = self.stores.iter().flat_map(Store::buffers).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }
}

impl From<&VarStore> for Params {
    fn from(vs: &VarStore) -> Self {
        Params::of(vec![Store::new(vs, String::new())])
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
        let leaves = params.leaves.iter().map(share).collect();
        let Params { stores, only, index, noise_end, separate, .. } = params;
        let (stores, only, index) = (stores.clone(), only.clone(), index.clone());
        Params { stores, only, leaves, index, noise_end: *noise_end, separate: *separate }
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
    fn several_stores_are_one_set_of_parameters() {
        let [actor, critic] = [0, 1].map(|_| VarStore::new(Device::Cpu));
        let w = actor.root().zeros("w", &[5]);
        let _ = critic.root().set_group(2).zeros("w", &[1]);
        let _ = critic.root().zeros_no_train("statistics", &[2]);
        let mut params = Params::of_stores([("actor", &actor), ("critic", &critic)]).unwrap();
        let names = |params: &Params| params.names().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(names(&params), ["actor.w", "critic.w"]);
        assert_eq!(params.leaves().iter().map(|l| (l.group, l.noise_group)).collect::<Vec<_>>(), [(0, 0), (2, 1)]);
        assert!(params.find("actor.w").unwrap().tensor.is_set_to(&w));
        assert_eq!(params.buffers().into_iter().map(|(n, _)| n).collect::<Vec<_>>(), ["critic.statistics"]);
        // Late variables go to the end, and a variable of both is one parameter.
        let _ = actor.root().sub("head").zeros("w", &[1]);
        let _ = critic.root().add("shared", w, true);
        params.refresh();
        assert_eq!(names(&params), ["actor.w", "critic.w", "actor.head.w"]);
        assert_eq!(params.leaves()[0].names, ["actor.w", "critic.shared"]);
        assert_eq!(names(&Params::from(&params)), names(&params));
        for bad in [["", "a"], ["a", "a"], ["a.b", "a"]] {
            let e = Params::of_stores(bad.into_iter().zip([&actor, &critic])).unwrap_err().to_string();
            assert!(e.contains("needs a name of its own"), "{e}");
        }
        assert_eq!(Params::of_stores([("a", &actor), ("ab", &critic)]).unwrap().len(), 3);
    }

    #[test]
    fn only_some() {
        let vs = VarStore::new(Device::Cpu);
        for (folder, name) in [("a", "w"), ("b", "w"), ("b", "v")] {
            let _ = vs.root().sub(folder).zeros(name, &[9]);
        }
        let _ = vs.root().zeros_no_train("statistics", &[2]);
        let of_b = |name: &str| name.starts_with("b.");
        let [mut b, mut rest] = [
            Params::from(&vs).only(of_b),
            Params::from(&vs).only(move |name| !of_b(name)).only(|name| name.ends_with('w')),
        ];
        let _ = vs.root().sub("b").zeros("late", &[1]);
        let _ = vs.root().sub("c").zeros("w", &[1]);
        let _ = vs.root().sub("c").zeros("v", &[1]);
        b.refresh();
        rest.refresh();
        assert_eq!(b.names().collect::<Vec<_>>(), ["b.w", "b.v", "b.late"]);
        assert_eq!(rest.names().collect::<Vec<_>>(), ["a.w", "c.w"]);
        // Its own noise starts at the beginning; the weights of the others are no buffers.
        assert_eq!(b.leaves().iter().map(|l| l.noise_group).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(b.buffers().into_iter().map(|(n, _)| n).collect::<Vec<_>>(), ["statistics"]);
        assert!(Params::from(&vs).only(|_| false).check().unwrap_err().to_string().contains("none"));
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
    }
}
