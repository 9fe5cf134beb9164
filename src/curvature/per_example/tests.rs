//! The oracle is a backward pass for every example. One file, however long: every kind of layer is held to the same
//! oracle by the same few functions.

use super::*;
use crate::nn::{Linear, conv2d, embedding, group_norm, layer_norm, linear};
use tch::nn::{
    ConvConfig, EmbeddingConfig, GroupNormConfig, Init, LayerNormConfig, LinearConfig, Module, PaddingMode, VarStore,
};
use tch::{Device, IndexOp, Kind};

const KINDS: [(Kind, f64); 2] = [(Kind::Float, 1e-5), (Kind::Double, 1e-10)];

fn named(vs: &VarStore) -> Vec<(String, Tensor)> {
    let mut named: Vec<_> = vs.variables().into_iter().filter(|(_, t)| t.requires_grad()).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    named
}

fn borrowed(named: &[(String, Tensor)]) -> Vec<(&str, &Tensor)> {
    named.iter().map(|(n, t)| (n.as_str(), t)).collect()
}

fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    let scale = b.norm().double_value(&[]);
    (a - b).norm().double_value(&[]) / if scale == 0.0 { 1.0 } else { scale }
}

/// (g, c) by a backward pass for every example.
fn oracle(losses: &Tensor, params: &[(&str, &Tensor)]) -> Vec<Option<(Tensor, Tensor)>> {
    let leaves: Vec<&Tensor> = params.iter().map(|p| p.1).collect();
    let batch = losses.size()[0];
    let rows: Vec<Vec<Tensor>> =
        (0..batch).map(|i| Tensor::run_backward(&[losses.get(i)], &leaves, true, false)).collect();
    (0..leaves.len())
        .map(|p| {
            rows[0][p].defined().then(|| {
                let all = Tensor::stack(&rows.iter().map(|row| row[p].to_kind(Kind::Double)).collect::<Vec<_>>(), 0);
                (all.mean_dim(0, false, None::<Kind>), all.square().mean_dim(0, false, None::<Kind>))
            })
        })
        .collect()
}

/// ℓᵢ = Σ sin(yᵢ) ⊙ t with a fixed t, so that no element of δ is like another.
fn losses_of(y: &Tensor) -> Tensor {
    let y = y.flatten(1, -1);
    let target = Tensor::arange(y.size()[1], (Kind::Double, Device::Cpu)).cos() + 0.5;
    (y.sin() * target.to_kind(y.kind())).sum_dim_intlist(1, false, None::<Kind>)
}

fn assert_matches(found: &PerExample, expected: &[Option<(Tensor, Tensor)>], params: &[(&str, &Tensor)], tol: f64) {
    for (p, (name, tensor)) in params.iter().enumerate() {
        match (&expected[p], &found.gradient[p], &found.squares[p]) {
            (None, None, None) => {}
            (Some((g, c)), Some(found_g), Some(found_c)) => {
                assert!(c.abs().max().double_value(&[]) > 0.0, "`{name}` tests nothing");
                let (eg, ec) = (relative_error(found_g, g), relative_error(found_c, c));
                assert!(eg < tol && ec < tol, "`{name}` {:?}: gradient {eg:e}, squares {ec:e}", tensor.kind());
                let exact = if tensor.kind() == Kind::Double { Kind::Double } else { Kind::Float };
                assert_eq!((found_g.kind(), found_c.kind()), (tensor.kind(), exact));
            }
            other => panic!("`{name}`: {other:?}"),
        }
    }
}

/// Compares with the oracle, in chunks of everything, of a few examples and of one, with and without the check.
fn agrees(vs: &VarStore, tol: f64, forward: impl Fn() -> Tensor) {
    let named = named(vs);
    let params = borrowed(&named);
    assert!(!params.is_empty());
    let losses = losses_of(&forward());
    let expected = oracle(&losses, &params);
    let most = params.iter().map(|p| p.1.numel() as i64).max().unwrap_or(1);
    for elements in [CHUNK_ELEMENTS, 8 * most, 1] {
        for check in [true, false] {
            let (loss, tape) = Tape::record(|| losses_of(&forward()).mean(None::<Kind>));
            let found = in_chunks(elements, &loss, None, &tape, &params, check).unwrap();
            assert_eq!((found.batch, found.mixed), (losses.size()[0], false));
            assert_matches(&found, &expected, &params, tol);
        }
    }
}

fn store() -> VarStore {
    VarStore::new(Device::Cpu)
}

fn randn(size: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(size, (kind, Device::Cpu))
}

fn wave(size: &[i64], phase: f64, kind: Kind) -> Tensor {
    let n = size.iter().product::<i64>();
    (Tensor::arange(n, (Kind::Double, Device::Cpu)) * 1.7 + phase).sin().reshape(size).to_kind(kind)
}

fn message(result: Result<PerExample>) -> String {
    match result {
        Err(Error::PerExample(text)) => text,
        other => panic!("expected Error::PerExample, found {other:?}"),
    }
}

const RANDOM: Init = Init::Randn { mean: 0.0, stdev: 0.7 };

#[test]
fn linear_with_and_without_positions_and_bias() {
    for (kind, tol) in KINDS {
        for size in [&[7, 5][..], &[7, 1, 5], &[7, 4, 5], &[7, 2, 3, 5]] {
            for bias in [true, false] {
                let mut vs = store();
                let net = linear(vs.root(), 5, 3, LinearConfig { bias, ..Default::default() });
                vs.set_kind(kind);
                let x = randn(size, kind);
                agrees(&vs, tol, || net.forward(&x));
            }
        }
    }
}

#[test]
fn linear_takes_the_closed_form_where_it_exists() {
    let vs = store();
    let net = linear(vs.root(), 5, 3, LinearConfig::default());
    for (size, exists) in [(&[7, 5][..], true), (&[7, 1, 5], true), (&[7, 4, 5], false)] {
        let (y, tape) = Tape::record(|| net.forward(&randn(size, Kind::Float)));
        let squares = tape.taps()[0].uses[0].rule.squares(&y.ones_like().detach()).unwrap();
        assert_eq!(squares.map(|c| c.size()), exists.then(|| vec![3, 5]));
    }
}

#[test]
fn deep_net_with_activations_in_place() {
    for (kind, tol) in KINDS {
        let mut vs = store();
        let net = tch::nn::seq()
            .add(linear(vs.root() / "1", 5, 8, LinearConfig::default()))
            .add_fn(|x| x.shallow_clone().relu_())
            .add(linear(vs.root() / "2", 8, 8, LinearConfig::default()))
            .add_fn(Tensor::tanh)
            .add(linear(vs.root() / "3", 8, 3, LinearConfig::default()))
            .add_fn(|x| x.shallow_clone().sigmoid_());
        vs.set_kind(kind);
        let x = randn(&[9, 5], kind);
        agrees(&vs, tol, || net.forward(&x));
    }
}

#[test]
fn conv2d_in_all_its_settings() {
    let d = ConvConfig { bs_init: RANDOM, ..Default::default() };
    let configs = [
        d,
        ConvConfig { bias: false, ..d },
        ConvConfig { stride: 2, ..d },
        ConvConfig { padding: 1, ..d },
        ConvConfig { dilation: 2, padding: 2, ..d },
        ConvConfig { groups: 2, ..d },
        ConvConfig { groups: 4, ..d },
        ConvConfig { groups: 2, stride: 2, padding: 1, dilation: 2, ..d },
        ConvConfig { padding: 2, padding_mode: PaddingMode::Reflect, ..d },
        ConvConfig { padding: 2, padding_mode: PaddingMode::Replicate, groups: 2, ..d },
        ConvConfig { padding: 1, padding_mode: PaddingMode::Circular, stride: 3, ..d },
    ];
    for (kind, tol) in KINDS {
        for (n, &config) in configs.iter().enumerate() {
            for kernel in [1, 3] {
                let mut vs = store();
                let first = conv2d(vs.root() / "1", 4, 4, kernel, config);
                let second = conv2d(vs.root() / "2", 4, 2, 1, ConvConfig::default());
                vs.set_kind(kind);
                // Not square, and with columns that a stride leaves over.
                let x = randn(&[5, 4, 9, 8 + (n as i64 % 2)], kind);
                agrees(&vs, tol, || second.forward(&first.forward(&x).tanh()));
            }
        }
    }
}

#[test]
fn conv2d_of_images_in_any_layout() {
    for (kind, tol) in KINDS {
        for padding in [0, 1] {
            let mut vs = store();
            let config = ConvConfig { padding, stride: 2, groups: 2, bs_init: RANDOM, ..Default::default() };
            let net = conv2d(vs.root(), 4, 4, 3, config);
            vs.set_kind(kind);
            let channels_last = randn(&[5, 9, 8, 4], kind).permute([0, 3, 1, 2]);
            let transposed = randn(&[5, 4, 8, 9], kind).transpose(2, 3);
            let one_for_all = randn(&[1, 4, 9, 8], kind).expand([5, 4, 9, 8], false);
            let part = randn(&[6, 5, 10, 9], kind).i((1.., 1.., 1.., 1..));
            for x in [channels_last, transposed, one_for_all, part] {
                assert!(!x.is_contiguous());
                agrees(&vs, tol, || net.forward(&x));
            }
        }
    }
}

#[test]
fn embedding_with_repeated_and_padding_tokens() {
    for (kind, tol) in KINDS {
        for padding_idx in [-1, 0, 3] {
            for tokens in [
                Tensor::from_slice(&[1_i64, 3, 1, 0, 4, 3]),
                Tensor::from_slice(&[1_i64, 1, 3, 3, 0, 1, 4, 4, 4, 3, 0, 2]).view([3, 4]),
                Tensor::from_slice(&[1_i32, 1, 3, 3, 0, 1, 4, 4, 4, 3, 0, 2]).view([2, 3, 2]),
            ] {
                let mut vs = store();
                let table = embedding(vs.root(), 6, 3, EmbeddingConfig { padding_idx, ..Default::default() });
                vs.set_kind(kind);
                agrees(&vs, tol, || table.forward(&tokens));
            }
        }
    }
}

#[test]
fn layer_norm_over_one_and_several_dimensions_and_at_zero_scale() {
    for (kind, tol) in KINDS {
        for ws_init in [RANDOM, Init::Const(0.0)] {
            for (shape, size) in [(vec![6], &[5, 6][..]), (vec![6], &[5, 3, 6]), (vec![3, 6], &[5, 2, 3, 6])] {
                let mut vs = store();
                let config = LayerNormConfig { ws_init, bs_init: RANDOM, ..Default::default() };
                let norm = layer_norm(vs.root(), shape, config);
                vs.set_kind(kind);
                let x = randn(size, kind);
                agrees(&vs, tol, || norm.forward(&x));
            }
        }
    }
}

#[test]
fn group_norm_with_and_without_space_and_at_zero_scale() {
    for (kind, tol) in KINDS {
        for ws_init in [RANDOM, Init::Const(0.0)] {
            for size in [&[5, 6][..], &[5, 6, 4], &[5, 6, 3, 2]] {
                let mut vs = store();
                let config = GroupNormConfig { ws_init, bs_init: RANDOM, ..Default::default() };
                let norm = group_norm(vs.root(), 2, 6, config);
                vs.set_kind(kind);
                let x = randn(size, kind);
                agrees(&vs, tol, || norm.forward(&x));
            }
        }
    }
}

#[test]
fn a_layer_applied_twice_adds_before_squaring() {
    for (kind, tol) in KINDS {
        let mut vs = store();
        let net = linear(vs.root(), 4, 4, LinearConfig::default());
        let conv = conv2d(vs.root() / "c", 2, 2, 3, ConvConfig { padding: 1, bs_init: RANDOM, ..Default::default() });
        vs.set_kind(kind);
        let x = randn(&[5, 2, 4, 4], kind);
        agrees(&vs, tol, || {
            let y = conv.forward(&conv.forward(&x).tanh());
            net.forward(&net.forward(&y).tanh())
        });
    }
}

#[test]
fn embedding_tied_to_the_output_layer() {
    for (kind, tol) in KINDS {
        let mut vs = store();
        let table = embedding(vs.root(), 6, 3, EmbeddingConfig { padding_idx: 2, ..Default::default() });
        let mut out = linear(vs.root() / "out", 3, 6, LinearConfig::default());
        vs.set_kind(kind);
        out.ws = table.ws.shallow_clone();
        // The variable that the tied one replaced has no part in the loss, which the oracle confirms.
        let tokens = Tensor::from_slice(&[1_i64, 1, 3, 2, 0, 1, 4, 4]).view([4, 2]);
        agrees(&vs, tol, || out.forward(&table.forward(&tokens).tanh()));
    }
}

/// Two layers, of which `second` can be bypassed or used by hand, and their data.
struct Two {
    vs: VarStore,
    first: Linear,
    second: Linear,
    x: Tensor,
}

impl Two {
    fn new(kind: Kind) -> Two {
        let mut vs = store();
        let first = linear(vs.root() / "first", 3, 4, LinearConfig::default());
        let second = linear(vs.root() / "second", 4, 2, LinearConfig::default());
        vs.set_kind(kind);
        Two { vs, first, second, x: randn(&[6, 3], kind) }
    }

    /// With weights and inputs of which no unit is dead by chance.
    fn fixed(kind: Kind) -> Two {
        let net = Two::new(kind);
        for (i, (_, w)) in named(&net.vs).into_iter().enumerate() {
            let value = wave(&w.size(), i as f64, kind);
            tch::no_grad(|| w.shallow_clone().copy_(&value));
        }
        Two { x: wave(&[6, 3], 0.0, kind), ..net }
    }

    fn hidden(&self) -> Tensor {
        self.first.forward(&self.x).tanh()
    }

    fn by_hand(&self, h: &Tensor) -> Tensor {
        h.matmul(&self.second.ws.tr())
    }

    /// Both forms of the same loss, from the mean and from the losses.
    fn both(&self, check: bool, losses: impl Fn() -> Tensor) -> [Result<PerExample>; 2] {
        let named = named(&self.vs);
        let params = borrowed(&named);
        [false, true].map(|give| {
            let (losses, tape) = Tape::record(&losses);
            let mean = losses.mean(None::<Kind>);
            per_example(&mean, give.then_some(&losses), &tape, &params, check)
        })
    }

    fn assert_right(&self, found: &PerExample, losses: impl Fn() -> Tensor, tol: f64) {
        let named = named(&self.vs);
        let params = borrowed(&named);
        assert_matches(found, &oracle(&losses(), &params), &params, tol);
    }
}

#[test]
fn unused_parameters_have_neither_gradient_nor_squares() {
    let net = Two::new(Kind::Double);
    let losses = || losses_of(&net.hidden());
    for found in net.both(true, losses) {
        let found = found.unwrap();
        assert_eq!(found.batch, 6);
        assert_eq!(found.squares.iter().filter(|c| c.is_none()).count(), 2);
        net.assert_right(&found, losses, 1e-10);
    }
}

#[test]
fn outputs_that_the_loss_ignores_count_for_nothing() {
    let net = Two::new(Kind::Double);
    let losses = || {
        let _ignored = net.second.forward(&net.hidden().i(..2));
        losses_of(&net.second.forward(&net.hidden()))
    };
    for found in net.both(true, losses) {
        net.assert_right(&found.unwrap(), losses, 1e-10);
    }
}

#[test]
fn untapped_parameters_need_the_losses() {
    for (kind, tol) in KINDS {
        let net = Two::new(kind);
        let losses = || losses_of(&net.by_hand(&net.hidden()));
        let [without, with] = net.both(false, losses);
        let text = message(without);
        assert!(text.contains("`second.weight`") && text.contains("tch_blr::nn") && text.contains("[B]"), "{text}");
        net.assert_right(&with.unwrap(), losses, tol);
    }
}

#[test]
fn parameters_used_by_hand_too_are_found_out_by_the_check() {
    for (kind, tol) in KINDS {
        let net = Two::new(kind);
        let losses = || {
            let h = net.hidden();
            losses_of(&(net.second.forward(&h) + 0.1 * net.by_hand(&h).sin()))
        };
        let [without, with] = net.both(true, losses);
        let text = message(without);
        assert!(text.contains("`second.weight`") && text.contains("outside of them"), "{text}");
        let with = with.unwrap();
        assert!(with.mixed);
        net.assert_right(&with, losses, tol);
        // Without the check, nobody notices.
        let [without, _] = net.both(false, losses);
        assert_eq!(without.unwrap().batch, 6);
    }
}

#[test]
fn different_leading_dimensions_need_the_losses() {
    for (kind, tol) in KINDS {
        let net = Two::new(kind);
        let losses = || {
            // The second layer sees pairs of the first one's rows.
            let h = net.hidden().view([3, 2, 4]).sum_dim_intlist(1, false, None::<Kind>);
            losses_of(&net.second.forward(&h))
        };
        for check in [true, false] {
            let [without, with] = net.both(check, losses);
            let text = message(without);
            assert!(text.contains("saw 6 examples") && text.contains('3') && text.contains("`second."), "{text}");
            let with = with.unwrap();
            assert_eq!(with.batch, 3);
            net.assert_right(&with, losses, tol);
        }
    }
}

/// Layers that see several views of the same examples: in pairs, in triplets of which the middle one is the hub, in a
/// chain, and compared by what has no second derivative by both.
#[test]
fn calls_for_the_same_examples_add_up() {
    for (kind, tol) in KINDS {
        let net = Two::fixed(kind);
        let (near, far) = (wave(&[6, 3], 1.0, kind), wave(&[6, 3], 2.0, kind));
        let f = |x: &Tensor| net.second.forward(&net.first.forward(x).relu());
        let sum = |t: Tensor| t.sum_dim_intlist(1, false, None::<Kind>);
        // Not their plain difference, in which the biases cancel.
        let apart = |a: &Tensor, b: &Tensor| sum((a * 1.5 - b).square());
        let pairs = || apart(&f(&net.x), &f(&near));
        let similar = || Tensor::cosine_similarity(&f(&net.x), &f(&near), 1, 1e-8);
        let hub = || {
            let (a, b, c) = (f(&near), f(&net.x), f(&far));
            apart(&a, &b) * 0.3 + apart(&b, &c)
        };
        let triplets = || (apart(&f(&net.x), &f(&near)) - apart(&f(&net.x), &f(&far)) + 0.5).relu();
        let chain = || {
            let back = |h: &Tensor| Tensor::cat(&[h, &net.x.narrow(1, 0, 1)], 1);
            losses_of(&f(&back(&f(&back(&f(&net.x)))).sin()))
        };
        // As a learned sum of two views: neither ∂L/∂z depends on the other's z before the last layer does.
        let joined = || losses_of(&net.second.forward(&(net.first.forward(&net.x) + net.first.forward(&near))).sin());
        let all: [&dyn Fn() -> Tensor; 6] = [&pairs, &similar, &hub, &triplets, &chain, &joined];
        for losses in all {
            for found in net.both(true, losses) {
                let found = found.unwrap();
                assert!(!found.mixed);
                net.assert_right(&found, losses, tol);
            }
        }
    }
}

/// A margin between two scores is linear in both, like a sum of two losses: only the losses tell them apart.
#[test]
fn calls_that_only_the_losses_tie_together_need_them() {
    for (kind, tol) in KINDS {
        let net = Two::fixed(kind);
        let worse = wave(&[6, 3], 1.0, kind);
        let score = |x: &Tensor| net.second.forward(&net.first.forward(x).tanh()).select(1, 0);
        let losses = || (score(&worse) * 1.5 - score(&net.x) + 2.0).clamp_min(0.1);
        let [without, with] = net.both(true, losses);
        let text = message(without);
        assert!(text.contains("if it is one set, return the [B]") && text.contains("`first."), "{text}");
        let with = with.unwrap();
        assert!(!with.mixed);
        net.assert_right(&with, losses, tol);
    }
}

/// A memory of as many examples as the batch: its gradients are no part of the batch's.
#[test]
fn calls_for_other_examples_are_found_out() {
    for (kind, tol) in KINDS {
        let net = Two::fixed(kind);
        let memory = wave(&[6, 3], 1.0, kind);
        let f = |x: &Tensor| net.second.forward(&net.first.forward(x).tanh());
        let of_memory = || losses_of(&f(&memory)).mean(None::<Kind>);
        let beside = || losses_of(&f(&net.x)) + of_memory() * 0.3;
        // A product ties them together, but not row by row.
        let times = || losses_of(&f(&net.x)) * (of_memory() + 3.0);
        // The rows of one call, in pairs of neighbours.
        let pairs = || losses_of(&(f(&net.x) + f(&net.x).roll([1], [0])));
        // The same for the outputs of one call; the means of this kind are not looked at.
        let rolled = || {
            let z = f(&net.x);
            losses_of(&(&z + z.roll([1], [0])))
        };
        let all: [(&dyn Fn() -> Tensor, bool); 4] = [(&beside, true), (&times, true), (&pairs, true), (&rolled, false)];
        for (losses, refused) in all {
            let [without, with] = net.both(true, losses);
            if refused {
                let text = message(without);
                assert!(text.contains("two sets of examples") && text.contains("Labels::Exact"), "{text}");
            }
            let with = with.unwrap();
            assert!(with.mixed);
            net.assert_right(&with, losses, tol);
        }
    }
}

#[test]
fn inputs_without_a_batch_are_not_tapped() {
    let vs = store();
    let root = vs.root();
    let modules: [(Box<dyn Module>, Tensor); 6] = [
        (Box::new(linear(&root / "l", 3, 2, LinearConfig::default())), randn(&[3], Kind::Float)),
        (Box::new(conv2d(&root / "c", 2, 2, 1, ConvConfig::default())), randn(&[2, 3, 3], Kind::Float)),
        (Box::new(embedding(&root / "e", 4, 2, EmbeddingConfig::default())), Tensor::from(1_i64)),
        (Box::new(layer_norm(&root / "n", vec![2, 3], LayerNormConfig::default())), randn(&[2, 3], Kind::Float)),
        (
            Box::new(embedding(&root / "s", 4, 2, EmbeddingConfig { sparse: true, ..Default::default() })),
            Tensor::from_slice(&[1_i64, 2]),
        ),
        (
            Box::new(embedding(&root / "f", 4, 2, EmbeddingConfig { scale_grad_by_freq: true, ..Default::default() })),
            Tensor::from_slice(&[1_i64, 2]),
        ),
    ];
    for (module, x) in &modules {
        let (_, tape) = Tape::record(|| module.forward(x));
        assert!(tape.taps().is_empty(), "{module:?}");
    }
    // With a batch, the first four are tapped.
    let ((), tape) = Tape::record(|| {
        for (module, x) in &modules[..4] {
            let _ = module.forward(&x.unsqueeze(0));
        }
    });
    assert_eq!(tape.taps().len(), 4);
}

#[test]
fn frozen_parameters_are_passed_over() {
    for (kind, tol) in KINDS {
        let mut vs = store();
        let (l, c) = (vs.root() / "l", vs.root() / "c");
        let conv = conv2d(c, 2, 2, 3, ConvConfig { bs_init: RANDOM, ..Default::default() });
        let norm = group_norm(vs.root() / "n", 1, 2, GroupNormConfig::default());
        let net = linear(l, 2, 3, LinearConfig::default());
        vs.set_kind(kind);
        for frozen in [&net.ws, &conv.ws, norm.bs.as_ref().unwrap()] {
            let _ = frozen.set_requires_grad(false);
        }
        let x = randn(&[5, 2, 4, 4], kind);
        let forward = || net.forward(&norm.forward(&conv.forward(&x)).flatten(2, -1).transpose(1, 2));
        agrees(&vs, tol, forward);
        assert_eq!(named(&vs).len(), 3);
        let (_, tape) = Tape::record(forward);
        assert_eq!(tape.taps().iter().map(|t| t.uses.len()).collect::<Vec<_>>(), [1, 1, 1]);
        vs.freeze();
        // The output still has a graph, through the input.
        let x = x.set_requires_grad(true);
        let (y, tape) = Tape::record(|| conv.forward(&x));
        assert!(y.requires_grad() && tape.taps().is_empty());
    }
}

#[test]
fn gradients_that_vanish_but_for_rounding_pass_the_check() {
    let mut vs = store();
    // The normalization subtracts the channel's mean, and the convolution's bias with it.
    let conv = conv2d(vs.root() / "c", 3, 8, 3, ConvConfig { bs_init: RANDOM, ..Default::default() });
    let norm = group_norm(vs.root() / "n", 8, 8, GroupNormConfig::default());
    vs.set_kind(Kind::Float);
    let x = randn(&[16, 3, 12, 12], Kind::Float);
    let (loss, tape) = Tape::record(|| losses_of(&norm.forward(&conv.forward(&x))).mean(None::<Kind>));
    let named = named(&vs);
    let found = per_example(&loss, None, &tape, &borrowed(&named), true).unwrap();
    assert_eq!(named[0].0, "c.bias");
    let size = |p: usize| norm_of(found.gradient[p].as_ref());
    assert!(size(0) < 1e-4 * size(1), "{} {}", size(0), size(1));
}

fn norm_of(x: Option<&Tensor>) -> f64 {
    x.map_or(f64::NAN, |x| x.norm().double_value(&[]))
}

#[test]
fn half_precision_gives_squares_in_f32() {
    let mut vs = store();
    let net = linear(vs.root(), 16, 8, LinearConfig::default());
    vs.set_kind(Kind::BFloat16);
    let named = named(&vs);
    let params = borrowed(&named);
    for size in [&[32, 16][..], &[32, 3, 16]] {
        let x = randn(size, Kind::BFloat16);
        let (losses, tape) = Tape::record(|| losses_of(&net.forward(&x)));
        let expected = oracle(&losses, &params);
        let found = per_example(&losses.mean(None::<Kind>), None, &tape, &params, true).unwrap();
        assert_eq!(found.gradient[0].as_ref().map(Tensor::kind), Some(Kind::BFloat16));
        assert_matches(&found, &expected, &params, 2e-2);
    }
    // The loop, too.
    let x = randn(&[4, 16], Kind::BFloat16);
    let losses = losses_of(&x.linear(&net.ws, net.bs.as_ref()));
    let expected = oracle(&losses, &params);
    let found = per_example(&losses.mean(None::<Kind>), Some(&losses), &Tape::default(), &params, true).unwrap();
    assert_matches(&found, &expected, &params, 2e-2);
}

#[test]
fn gradients_that_are_not_finite_are_handed_on() {
    let net = Two::new(Kind::Float);
    let x = &net.x * f64::NAN;
    let losses = || losses_of(&net.second.forward(&net.first.forward(&x)));
    let [without, _] = net.both(true, losses);
    assert!(norm_of(without.unwrap().gradient[0].as_ref()).is_nan());
}

#[test]
fn losses_of_another_shape_are_refused() {
    let net = Two::new(Kind::Float);
    let named = named(&net.vs);
    let params = borrowed(&named);
    let (y, tape) = Tape::record(|| net.second.forward(&net.hidden()));
    let mean = y.mean(None::<Kind>);
    let refused = |loss: &Tensor, losses: Option<&Tensor>| {
        matches!(per_example(loss, losses, &tape, &params, false), Err(Error::Loss(_)))
    };
    assert!(refused(&losses_of(&y), None));
    assert!(refused(&mean.detach(), None));
    assert!(refused(&mean, Some(&y)));
    assert!(refused(&mean, Some(&mean)));
    assert!(refused(&mean, Some(&losses_of(&y).i(..0))));
    assert!(refused(&mean, Some(&losses_of(&y).detach())));
}

#[test]
fn no_parameters_touch_no_gradient() {
    let net = Two::new(Kind::Float);
    let (losses, tape) = Tape::record(|| losses_of(&net.hidden()));
    let found = per_example(&losses.mean(None::<Kind>), Some(&losses), &tape, &[], true).unwrap();
    assert_eq!((found.gradient.len(), found.squares.len(), found.batch), (0, 0, 6));
    let found = per_example(&losses.mean(None::<Kind>), None, &tape, &borrowed(&named(&net.vs)), true).unwrap();
    assert_eq!(found.batch, 6);
    assert!(!net.first.ws.grad().defined());
}

#[test]
fn a_swap_of_the_data_between_forward_and_backward_leaves_the_parameters_recognisable() {
    let mut net = Two::new(Kind::Double);
    let (loss, tape) = Tape::record(|| losses_of(&net.second.forward(&net.hidden())).mean(None::<Kind>));
    let expected = {
        let named = named(&net.vs);
        let params = borrowed(&named);
        oracle(&losses_of(&net.second.forward(&net.hidden())), &params)
    };
    let other = net.first.ws.detach().copy();
    net.first.ws.set_data(&other);
    let named = named(&net.vs);
    let params = borrowed(&named);
    assert_matches(&per_example(&loss, None, &tape, &params, true).unwrap(), &expected, &params, 1e-10);
}

#[test]
fn a_view_of_a_parameter_is_not_the_parameter() {
    for (kind, tol) in KINDS {
        let mut vs = store();
        let mut net = linear(vs.root(), 3, 3, LinearConfig { bias: false, ..Default::default() });
        vs.set_kind(kind);
        net.ws = net.ws.tr();
        let named = named(&vs);
        let params = borrowed(&named);
        let x = randn(&[4, 3], kind);
        let (losses, tape) = Tape::record(|| losses_of(&net.forward(&x)));
        let mean = losses.mean(None::<Kind>);
        let with = per_example(&mean, Some(&losses), &tape, &params, false).unwrap();
        assert_matches(&with, &oracle(&losses, &params), &params, tol);
        assert!(message(per_example(&mean, None, &tape, &params, false)).contains("`weight`"));
    }
}
