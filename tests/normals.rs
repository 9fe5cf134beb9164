//! The f32 normals that training uses, at 10⁸ draws and more, through the public interface: `make test-statistics`.
//!
//! Each test prints a table whose lines are a statistic, what it came to, and the interval in which it has to lie. For
//! independent standard normals one line is outside of its interval with probability [`LEVEL`] (where a sum is taken for
//! normal that is not quite, its test says what that changes), so that with 51 lines any is with probability below
//! 4·10⁻⁴ (Bonferroni). Seeds are fixed: having passed once, a test always passes.

use std::fmt::Write;
use support::F64;
use tch::{Device, Kind, Tensor};
use tch_blr::{Derivatives, DiagonalGaussian, Ivon, Params, Philox};

/// The probability of 4.5 standard errors or more, on both sides together.
const LEVEL: f64 = 6.8e-6;

/// Draws per tensor.
const CHUNK: usize = 1 << 20;

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);
/// A statistic and the interval in which it has to lie.
struct Line {
    name: String,
    value: f64,
    interval: [f64; 2],
}

impl Line {
    /// A statistic that is standard normal.
    fn score(name: impl Into<String>, value: f64) -> Self {
        Self::largest_of(1, name, value)
    }

    /// That of `m` standard normals, dependent or not, which is farthest from 0.
    fn largest_of(m: usize, name: impl Into<String>, value: f64) -> Self {
        let bound = -Tensor::from(LEVEL / (2 * m) as f64).special_ndtri().double_value(&[]);
        Line { name: name.into(), value, interval: [-bound, bound] }
    }

    /// A count with this expectation, of events that are rare and independent. The interval is that of the Poisson
    /// distribution, which a binomial count leaves even less often (Anderson and Samuels 1967).
    fn count(name: impl Into<String>, value: u64, expected: f64) -> Self {
        // Beyond eight standard deviations and 60 more there is nothing that counts.
        let (first, last) = [-1.0, 1.0].map(|sign| expected + sign * (8.0 * expected.sqrt() + 60.0)).into();
        let (first, last) = (first.max(0.0) as u64, last as u64);
        let probability = |k: u64| {
            let log_factorial = Tensor::from(k as f64 + 1.0).lgamma().double_value(&[]);
            (k as f64 * expected.ln() - expected - log_factorial).exp()
        };
        let (mut p, mut below, mut low) = (probability(first), 0.0, first);
        while below + p < LEVEL / 2.0 {
            below += p;
            low += 1;
            p *= expected / low as f64;
        }
        let (mut p, mut above, mut high) = (probability(last), 0.0, last);
        while above + p < LEVEL / 2.0 {
            above += p;
            p *= high as f64 / expected;
            high -= 1;
        }
        let name = format!("{}, expected {expected:.1}", name.into());
        Line { name, value: value as f64, interval: [low, high].map(|k| k as f64) }
    }
}

/// Prints the lines of a test and checks them.
#[track_caller]
fn table<const LINES: usize>(title: &str, lines: &[Line; LINES]) {
    let mut text = format!("\n{title}: {LINES} statistics\n");
    let digits = |x: f64| if x.fract() == 0.0 { format!("{x}") } else { format!("{x:.4}") };
    for Line { name, value, interval: [low, high] } in lines {
        let verdict = if (low..=high).contains(&value) { "" } else { "  <- outside" };
        let [value, low, high] = [value, low, high].map(|x| digits(*x));
        writeln!(text, "  {name:<46} {value:>10}   in [{low}, {high}]{verdict}").unwrap();
    }
    print!("{text}"); // at once: tests run side by side
    assert!(!text.contains("outside"), "{text}");
}

/// N(0, 1) for parameters `names` of `CHUNK` weights each.
fn standard(names: &[&str]) -> DiagonalGaussian {
    let n = [CHUNK as i64];
    let entries = names.iter().map(|name| (*name, Tensor::zeros(n, F32), Tensor::ones(n, F32)));
    DiagonalGaussian::new(entries).unwrap()
}

/// Calls `f` with `chunks` times `CHUNK` normals: samples 0, 1, … of one parameter.
fn each_chunk(seed: u64, chunks: u64, mut f: impl FnMut(&[f32])) {
    let q = standard(&["w"]).with_seed(seed);
    let mut z = vec![0_f32; CHUNK];
    for k in 0..chunks {
        q.sample(k).unwrap()[0].1.copy_data(&mut z, CHUNK);
        f(&z);
    }
}

/// 1·3·5···n
fn double_factorial(n: i32) -> f64 {
    (1..=n).step_by(2).map(f64::from).product()
}

/// E zᵏ
fn moment(k: i32) -> f64 {
    if k % 2 == 0 { double_factorial(k - 1) } else { 0.0 }
}

/// Averages of z, z², …, z⁸ over 2²⁸ draws, in exact standard errors: Var zᵏ = E z²ᵏ - (E zᵏ)². The average of z⁸ is
/// the least normal of them, with a skewness of 0.007: 4.5 standard errors above are a tenth more probable than for a
/// normal, below a tenth less. What z⁸ loses by ending at 6.76 is a thousandth of its standard error.
#[test]
#[ignore = "10⁸ draws and more: make test-statistics"]
fn moments() {
    const CHUNKS: u64 = 1 << 8;
    let mut sums = [0.0; 8];
    each_chunk(1, CHUNKS, |z| {
        // Sums of a chunk first, so that no addend is lost in a large total.
        let mut chunk = [0.0; 8];
        for z in z {
            let z = f64::from(*z);
            let mut power = 1.0;
            for sum in &mut chunk {
                power *= z;
                *sum += power;
            }
        }
        for (sum, chunk) in sums.iter_mut().zip(chunk) {
            *sum += chunk;
        }
    });
    let n = CHUNKS as f64 * CHUNK as f64;
    let lines = [1, 2, 3, 4, 5, 6, 7, 8].map(|k| {
        let error = ((moment(2 * k) - moment(k).powi(2)) / n).sqrt();
        Line::score(
            format!("(mean of z^{k} - {}) / standard error", moment(k)),
            (sums[k as usize - 1] / n - moment(k)) / error,
        )
    });
    table("moments of 2^28 draws", &lines);
}

/// The distribution function of 2²⁸ draws, counted in 7·2¹⁹ cells [i, i+1)·2⁻¹⁸ from -7 to 7, whose edges are exact in f32.
///
/// Kolmogorov-Smirnov: the distance at the edges, plus the largest probability of a cell (1.5·10⁻⁶, an hundredth of the
/// bound), is an upper bound of the distance anywhere; it exceeds √(ln(2/level)/2n) with probability `LEVEL` at most
/// (Massart 1990). Chi-square: cells are joined to K of probability 1/K as nearly as they allow, and χ² goes to a
/// standard normal by Wilson and Hilferty's cube root.
#[test]
#[ignore = "10⁸ draws and more: make test-statistics"]
fn distribution() {
    const CHUNKS: u64 = 1 << 8;
    const PER_UNIT: f64 = 262_144.0;
    const HALF: f64 = 7.0;
    let cells = (2.0 * HALF * PER_UNIT) as usize;
    let mut counts = vec![0_u32; cells];
    each_chunk(2, CHUNKS, |z| {
        for z in z {
            counts[((f64::from(*z) + HALF) * PER_UNIT) as usize] += 1;
        }
    });
    let n = CHUNKS as f64 * CHUNK as f64;
    let edges = Tensor::arange(cells as i64 + 1, F64) / PER_UNIT - HALF;
    let cdf = Vec::<f64>::try_from(edges.special_ndtr()).unwrap();
    // Draws below each edge.
    let below: Vec<u64> = std::iter::once(0)
        .chain(counts.iter().scan(0, |sum, count| {
            *sum += u64::from(*count);
            Some(*sum)
        }))
        .collect();
    let at_edges = below.iter().zip(&cdf).map(|(below, p)| (*below as f64 / n - p).abs()).fold(0.0, f64::max);
    let within_cell = cdf.windows(2).map(|p| p[1] - p[0]).fold(0.0, f64::max);
    let bound = ((2.0 / LEVEL).ln() / 2.0).sqrt();
    let ks = Line {
        name: "Kolmogorov-Smirnov distance · √n".to_owned(),
        value: (at_edges + within_cell) * n.sqrt(),
        interval: [0.0, bound],
    };
    let chi_square = |joined: usize| {
        let mut edges: Vec<usize> =
            (1..joined).map(|k| cdf.partition_point(|p| p * (joined as f64) < k as f64)).collect();
        edges.push(cells);
        let (mut chi_square, mut from) = (0.0, 0);
        for to in edges {
            // All that is left of the first edge and right of the last belongs to the outer cells.
            let low = if from == 0 { 0.0 } else { cdf[from] };
            let high = if to == cells { 1.0 } else { cdf[to] };
            let expected = n * (high - low);
            chi_square += ((below[to] - below[from]) as f64 - expected).powi(2) / expected;
            from = to;
        }
        let freedom = joined as f64 - 1.0;
        let spread = 2.0 / (9.0 * freedom);
        let score = ((chi_square / freedom).cbrt() - (1.0 - spread)) / spread.sqrt();
        Line::score(format!("χ² of {joined} cells = {chi_square:.1}, as a normal"), score)
    };
    table("distribution of 2^28 draws", &[ks, chi_square(1 << 8), chi_square(1 << 16)]);
}

/// r for the uniform (x+½)/2³²: both normals of a pair are r times a cosine.
fn radius(x: u64) -> f64 {
    (-2.0 * ((x as f64 + 0.5) / 4_294_967_296.0).ln()).sqrt()
}

/// P(z > t) for the 2³² values of u₀, the angle taken as continuous: 2⁻³² Σ arccos(t/r)/π over those with r > t. With
/// both uniforms discrete it is the same to a relative 10⁻⁸, since an arc of a circle of 2³² points holds its share to ±1.
fn tail(t: f64) -> f64 {
    let arcs = (0..).map(radius).take_while(|r| *r > t).map(|r| (t / r).acos());
    arcs.sum::<f64>() / std::f64::consts::PI / 4_294_967_296.0
}

/// Draws beyond 3, 4, 5, 5.5 and 6 on either side, of 2³³, and the farthest, which is limited by the smallest u₀ = 2⁻³³ to
/// √(66 ln 2) = 6.7637 and some units of rounding. The 8 units of rounding by which the f32 transform may be off move the
/// expectation of a count by less than a twentieth of its standard deviation.
///
/// 17 are expected beyond 6, so that their lack shows: u₀ of 24 bits, as many generators in f32 have, ends at 5.9.
#[test]
#[ignore = "10⁸ draws and more: make test-statistics"]
fn tails() {
    const CHUNKS: u64 = 1 << 13;
    const BEYOND: [f32; 5] = [3.0, 4.0, 5.0, 5.5, 6.0];
    let mut counts = [[0_u64; 5]; 2];
    let mut farthest = 0_f32;
    each_chunk(3, CHUNKS, |z| {
        let far: Vec<f32> = z.iter().copied().filter(|z| z.abs() > BEYOND[0]).collect();
        for z in far {
            farthest = farthest.max(z.abs());
            for (count, t) in counts[usize::from(z > 0.0)].iter_mut().zip(BEYOND) {
                *count += u64::from(z.abs() > t);
            }
        }
    });
    let n = CHUNKS as f64 * CHUNK as f64;
    let mut lines = Vec::new();
    for (i, t) in BEYOND.into_iter().enumerate() {
        let expected = n * tail(f64::from(t));
        lines.push(Line::count(format!("draws below -{t}"), counts[0][i], expected));
        lines.push(Line::count(format!("draws above  {t}"), counts[1][i], expected));
        lines.push(Line::count(format!("draws beyond ±{t}"), counts[0][i] + counts[1][i], 2.0 * expected));
    }
    let largest = radius(0) * (1.0 + 8.0 * f64::from(f32::EPSILON));
    lines.push(Line {
        name: "farthest draw".to_owned(),
        value: farthest.into(),
        interval: [f64::from(BEYOND[4]), largest],
    });
    let Ok(lines): Result<[Line; 16], _> = lines.try_into() else { unreachable!() };
    table("tails of 2^33 draws", &lines);
}

/// Normals of a group: counters that are worked on together give these.
const GROUP: i64 = 64;

/// Sums over rows of all products of two columns, of z and of (z²-1)/√2, which have the variance 1 both.
///
/// The products of squares have a skewness of 8. Over the 2¹⁹ rows of a test, the least here, that raises the upper of the
/// two probabilities of a score of 6.3 by half and lowers the other by a third, and their sum by a tenth.
struct Products {
    rows: f64,
    sums: [Tensor; 2],
}

impl Products {
    fn new(left: i64, right: i64) -> Self {
        Products { rows: 0.0, sums: [0, 1].map(|_| Tensor::zeros([left, right], F64)) }
    }

    /// Adds rows of f32 normals: the first columns with all columns.
    fn add(&mut self, rows: &Tensor) {
        self.rows += rows.size()[0] as f64;
        let z = rows.to_kind(Kind::Double);
        let squares = (z.square() - 1.0) / 2_f64.sqrt();
        for (sums, x) in self.sums.iter_mut().zip([z, squares]) {
            let left = x.narrow(1, 0, sums.size()[0]);
            *sums += left.tr().matmul(&x);
        }
    }

    /// r√rows, standard normal for columns that are independent: `[left][right]`, of z and of its square.
    fn scores(self) -> [Vec<Vec<f64>>; 2] {
        self.sums.map(|sums| Vec::<Vec<f64>>::try_from(sums / self.rows.sqrt()).unwrap())
    }
}

/// The number that is farthest from 0, of how many.
fn farthest(scores: impl IntoIterator<Item = f64>) -> (usize, f64) {
    scores.into_iter().fold((0, 0.0), |(m, far), x: f64| (m + 1, if x.abs() > f64::abs(far) { x } else { far }))
}

/// Correlations of draws of 2²⁸ with those that follow, and of their squares, because the two normals of a pair share a
/// radius: by lag, and for every two places of a group of 64, and every place with every place of the next group.
#[test]
#[ignore = "10⁸ draws and more: make test-statistics"]
fn serial_correlations() {
    const CHUNKS: u64 = 1 << 8;
    let mut products = Products::new(GROUP, 2 * GROUP);
    each_chunk(4, CHUNKS, |z| products.add(&Tensor::from_slice(z).unfold(0, 2 * GROUP, GROUP)));
    let group = GROUP as usize;
    let lines = |scores: Vec<Vec<f64>>, what: &str| {
        let lags = (1..=group).map(|lag| (0..group).map(|i| scores[i][i + lag]).sum::<f64>() / (group as f64).sqrt());
        let (m, by_lag) = farthest(lags);
        let (pairs, by_place) = farthest((0..group).flat_map(|i| scores[i][i + 1..].to_vec()));
        [
            Line::largest_of(m, format!("{what}: r√n, lags 1 to {m}"), by_lag),
            Line::largest_of(pairs, format!("{what}: r√n, {pairs} pairs of places"), by_place),
        ]
    };
    let [z, squares] = products.scores();
    let [[a, b], [c, d]] = [lines(z, "z"), lines(squares, "z²")];
    table("serial correlations of 2^28 draws", &[a, b, c, d]);
}

/// Streams that are compared with each other.
const STREAMS: usize = 4;

/// Correlations between `STREAMS` streams of normals: at equal positions, and for every two places of the streams' groups.
/// `draw(i)` is the i-th chunk of each stream.
fn between_streams(title: &str, chunks: u64, draw: impl Fn(u64) -> Vec<Tensor>) {
    let columns = STREAMS as i64 * GROUP;
    let mut products = Products::new(columns, columns);
    for i in 0..chunks {
        let streams: Vec<Tensor> = draw(i).iter().map(|z| z.reshape([-1, GROUP])).collect();
        assert_eq!(streams.len(), STREAMS);
        products.add(&Tensor::cat(&streams, 1));
    }
    let group = GROUP as usize;
    let streams = || (0..STREAMS).flat_map(|a| (a + 1..STREAMS).map(move |b| (a * group, b * group)));
    let lines = |scores: Vec<Vec<f64>>, what: &str| {
        let equal =
            |(a, b): (usize, usize)| (0..group).map(|p| scores[a + p][b + p]).sum::<f64>() / (group as f64).sqrt();
        let (m, by_stream) = farthest(streams().map(equal));
        let all =
            streams().flat_map(|(a, b)| scores[a..a + group].iter().flat_map(move |row| row[b..b + group].to_vec()));
        let (pairs, by_place) = farthest(all);
        [
            Line::largest_of(m, format!("{what}: r√n at equal positions, {m} pairs"), by_stream),
            Line::largest_of(pairs, format!("{what}: r√n, {pairs} pairs of places"), by_place),
        ]
    };
    let [z, squares] = products.scores();
    let [[a, b], [c, d]] = [lines(z, "z"), lines(squares, "z²")];
    let draws = chunks * CHUNK as u64;
    table(&format!("correlations between {STREAMS} {title} of {draws} draws each"), &[a, b, c, d]);
}

fn only(sample: Vec<(String, Tensor)>) -> Tensor {
    sample.into_iter().next().unwrap().1
}

#[test]
#[ignore = "10⁸ draws and more: make test-statistics"]
fn correlations_between_samples() {
    let q = standard(&["w"]).with_seed(5);
    between_streams("samples", 32, |i| (0..4).map(|k| only(q.sample(4 * i + k).unwrap())).collect());
}

#[test]
#[ignore = "10⁸ draws and more: make test-statistics"]
fn correlations_between_parameters() {
    let q = standard(&["a", "b", "c", "d"]).with_seed(6);
    between_streams("parameters", 32, |i| q.sample(i).unwrap().into_iter().map(|(_, z)| z).collect());
}

/// Seeds that follow each other, as users choose them.
#[test]
#[ignore = "10⁸ draws and more: make test-statistics"]
fn correlations_between_seeds() {
    let q = standard(&["w"]);
    let draw = |seed, k| only(q.shallow_clone().with_seed(seed).sample(k).unwrap());
    between_streams("seeds", 32, |i| (0..4).map(|seed| draw(seed, i)).collect());
}

/// A generator, and what it becomes for ranks 0, 1 and 2.
#[test]
#[ignore = "10⁸ draws and more: make test-statistics"]
fn correlations_between_ranks() {
    let q = standard(&["w"]);
    let draw = |p: Philox, k| only(q.shallow_clone().with_seed(p.seed).sample(k).unwrap());
    let p = Philox { seed: 7 };
    let all = [p, p.fold_in(0), p.fold_in(1), p.fold_in(2)];
    between_streams("ranks", 32, |i| all.map(|p| draw(p, i)).into());
}

/// Where IVON evaluates the loss, in steps that change nothing: at mean 0 and σ = 1/√(ess·(h₀+δ)) = 1.
#[test]
#[ignore = "10⁸ draws and more: make test-statistics"]
fn correlations_between_steps() {
    let w = Tensor::zeros([CHUNK as i64], F32).set_requires_grad(true);
    let params = Params::named([("w", w.shallow_clone())]).unwrap();
    let rule = Ivon::default().ess(1.0).hess_init(1.0).weight_decay(0.0);
    let opt = std::cell::RefCell::new(rule.noise(Philox { seed: 8 }).build(params, 0.0).unwrap());
    between_streams("steps", 32, |_| {
        let mut opt = opt.borrow_mut();
        let step = |_| {
            let evaluation = opt.perturbed().unwrap();
            let z = w.detach().copy();
            let nothing = Derivatives { loss: 0.0, examples: None, gradients: vec![None], squares: Vec::new() };
            evaluation.step(nothing).unwrap();
            z
        };
        (0..STREAMS).map(step).collect()
    });
}
