//! scratch: reads lines of JSON from stdin, each an experiment
use serde_json::Value;
use std::io::BufRead;
use tch::{Kind, Tensor};
use tch_blr::{
    Adam, Ivon, Von, DiagonalGaussian, Philox, Schedule, Train, clamp_information, combine, metrics, nn,
};
use tch_blr_examples::Outcome;
use tch_blr_examples::batches::{Last, batches, subset};
use tch_blr_examples::handwritten::Examples;
use tch_blr_examples::model::{Mlp, accuracy};

type AnyErr = Box<dyn std::error::Error>;

fn f(v: &Value, k: &str, d: f64) -> f64 {
    v[k].as_f64().unwrap_or(d)
}

fn fit(
    net: &Mlp,
    row: &Value,
    lr: f64,
    prior: Option<&DiagonalGaussian>,
    data: &Examples,
    epochs: u64,
    size: usize,
    seed: u64,
    warm: f64,
    clip: Option<f64>,
) -> Result<Box<dyn Train>, AnyErr> {
    let per = data.len().div_ceil(size) as u64;
    let total = epochs * per;
    let schedule = if warm < 0.0 { Schedule::Constant } else { Schedule::WarmupCosine { warmup: (warm * total as f64) as u64, total } };
    macro_rules! built { ($Row:ty, $v:expr) => {{
        let row: $Row = serde_json::from_value($v.clone())?;
        let mut b = row.noise(Philox { seed }).schedule(schedule);
        if let Some(c) = clip { b = b.clip_grad_norm(c); }
        if let Some(q) = prior { b = b.prior(q); }
        Box::new(b.build(&net.vs, lr)?) as Box<dyn Train>
    }} }
    let mut opt = if let Some(v) = row.get("ivon") { built!(Ivon, v) } else if let Some(v) = row.get("von") { built!(Von, v) } else {
        let row: Adam = serde_json::from_value(row["adam"].clone())?;
        Box::new(row.schedule(schedule).build(&net.vs, lr)?) as Box<dyn Train>
    };
    for epoch in 0..epochs {
        for (x, y) in batches(&data.images, &data.labels, size, 1000 * seed + epoch, Last::Keep) {
            opt.step(&mut || nn::cross_entropy(&net.logits(&x), &y))?;
        }
    }
    Ok(opt)
}

fn posterior(opt: &dyn Train) -> Result<DiagonalGaussian, AnyErr> {
    let path = std::env::temp_dir().join(format!("scratch_q_{}", std::process::id()));
    opt.posterior()?.save(&path)?;
    Ok(DiagonalGaussian::load(&path)?)
}

fn shifted(images: &Tensor, dx: i64, dy: i64) -> Tensor {
    // zero fill
    let x = images.view([-1, 8, 8]);
    let padded = x.constant_pad_nd(&[2, 2, 2, 2]);
    padded.narrow(1, 2 - dy, 8).narrow(2, 2 - dx, 8).reshape([-1, 64])
}
fn transform(name: &str) -> impl Fn(&Tensor) -> Tensor {
    let name = name.to_owned();
    move |x: &Tensor| match name.as_str() {
        "rot" => x.view([-1, 8, 8]).rot90(1, [1, 2]).reshape([-1, 64]),
        "shift1" => shifted(x, 1, 1),
        "right" => shifted(x, 1, 0),
        "left2" => shifted(x, -2, 0),
        "right2" => shifted(x, 2, 0),
        "flip" => x.view([-1, 8, 8]).flip([2]).reshape([-1, 64]),
        "neg" => 1.0 - x,
        "perm" => {
            let p: Vec<i64> = (0..64).map(|i| (i * 29 + 11) % 64).collect();
            x.index_select(1, &Tensor::from_slice(&p))
        }
        _ => x.copy(),
    }
}

fn ms(v: &[f64]) -> String {
    let n = v.len() as f64;
    let m = v.iter().sum::<f64>() / n;
    let s = if v.len() > 1 { (v.iter().map(|x| (x - m).powi(2)).sum::<f64>() / (n - 1.0)).sqrt() } else { 0.0 };
    format!("{m:.4}±{s:.4}")
}

fn scores(p: &Tensor, y: &Tensor) -> Result<[f64; 3], AnyErr> {
    Ok([metrics::accuracy(p, y)?, metrics::nll(p, y)?, metrics::reliability(p, y, 15)?.ece()])
}

fn experiment(e: &Value) -> Outcome {
    let n = f(e, "n", 400.0) as usize;
    let w = tch_blr_examples::handwritten::Writers::new()?;
    let train = Examples { images: w.train.images.narrow(0, 0, n as i64), labels: w.train.labels.narrow(0, 0, n as i64) };
    let (val, test) = (w.validation, w.test);
    let on = if e["on"] == "test" { &test } else { &val };
    let seeds = f(e, "seeds", 3.0) as u64;
    let hidden = f(e, "hidden", 100.0) as i64;
    let sizes: Vec<i64> =
        if f(e, "layers", 2.0) as i64 == 1 { vec![64, hidden, 10] } else { vec![64, hidden, hidden, 10] };
    let (epochs, size) = (f(e, "epochs", 100.0) as u64, f(e, "batch", 50.0) as usize);
    let warm = f(e, "warm", 0.05);
    let clip = e["clip"].as_f64();
    let started = std::time::Instant::now();
    let mut at_mean = vec![vec![]; 3];
    let mut sampled = vec![vec![]; 3];
    let mut extra: std::collections::BTreeMap<String, Vec<f64>> = Default::default();
    for seed in 0..seeds {
        tch::manual_seed(seed as i64);
        let net = Mlp::new(&sizes);
        let opt = fit(&net, &e["row"], f(e, "lr", 0.1), None, &train, epochs, size, seed, warm, clip)?;
        let s = scores(&net.probabilities(&on.images), &on.labels)?;
        (0..3).for_each(|i| at_mean[i].push(s[i]));
        let Ok(_) = opt.posterior() else { continue };
        let q = posterior(&*opt)?;
        let p = q.predict(&net.vs, 64, || net.probabilities(&on.images))?.mean;
        let s = scores(&p, &on.labels)?;
        (0..3).for_each(|i| sampled[i].push(s[i]));
        let sig: Vec<f64> = q
            .names()
            .flat_map(|n| {
                Vec::<f64>::try_from(q.precision(n).unwrap().rsqrt().flatten(0, -1).to_kind(Kind::Double)).unwrap()
            })
            .collect();
        let mut sorted = sig.clone();
        sorted.sort_by(f64::total_cmp);
        extra.entry("sig10".into()).or_default().push(sorted[sorted.len() / 10]);
        extra.entry("sig90".into()).or_default().push(sorted[sorted.len() * 9 / 10]);
        for task in e["tasks"].as_array().unwrap_or(&vec![]) {
            let how = task["transform"].as_str().unwrap();
            let t = transform(how);
            let (second, on2) = (train.with(&t), on.with(&t));
            let row = if task["row"].is_null() { &e["row"] } else { &task["row"] };
            let lr = f(task, "lr", f(e, "lr", 0.1));
            let ep = f(task, "epochs", epochs as f64) as u64;
            let mut uniform_total = 0.0;
            for n in q.names() {
                uniform_total += q.precision(n).unwrap().sum(Kind::Double).double_value(&[]);
            }
            let mean_precision = uniform_total / q.len() as f64;
            let uniform = DiagonalGaussian::new(q.names().map(|n| {
                let m = q.mean(n).unwrap();
                let s = m.full_like(mean_precision);
                (n.to_owned(), m, s)
            }))?;
            let tempered = q.temper(f(task, "tau", 1.0))?;
            for (what, prior) in [("q", Some(&tempered)), ("uni", Some(&uniform)), ("none", None)] {
                if task["merge"] == true {
                    break;
                }
                q.copy_mean_to(&net.vs)?;
                fit(&net, row, lr, prior, &second, ep, size, seed + 100, warm, clip)?;
                extra.entry(format!("{how}-{what}-old")).or_default().push(accuracy(&net, &on.images, &on.labels)?);
                extra.entry(format!("{how}-{what}-new")).or_default().push(accuracy(&net, &on2.images, &on2.labels)?);
            }
            if task["merge"] == true {
                let mut fts = Vec::new();
                for digits in [[0i64, 1, 2, 3, 4], [5, 6, 7, 8, 9]] {
                    q.copy_mean_to(&net.vs)?;
                    let part = second.at(&subset(&second.labels, &digits));
                    let mut row = row.clone();
                    for v in row.as_object_mut().unwrap().values_mut() {
                        v["ess"] = (part.len() as f64).into();
                    }
                    let opt = fit(&net, &row, lr, Some(&tempered), &part, ep, size, seed + 100, warm, clip)?;
                    extra.entry(format!("{how}-ft{}", digits[0])).or_default().push(accuracy(
                        &net,
                        &on2.images,
                        &on2.labels,
                    )?);
                    fts.push(posterior(&*opt)?);
                }
                let ones = |q: &DiagonalGaussian| {
                    DiagonalGaussian::new(
                        q.names().map(|n| (n.to_owned(), q.mean(n).unwrap(), q.mean(n).unwrap().ones_like())),
                    )
                    .unwrap()
                };
                let (a, b) = (&fts[0], &fts[1]);
                let mut put = |name: &str, r: tch_blr::Result<DiagonalGaussian>| {
                    let acc = match r {
                        Ok(r) => {
                            r.copy_mean_to(&net.vs).unwrap();
                            accuracy(&net, &on2.images, &on2.labels).unwrap()
                        }
                        Err(_) => f64::NAN,
                    };
                    extra.entry(format!("{how}-{name}")).or_default().push(acc);
                };
                put("base", combine(&[(1.0, &q)]));
                put("avg", combine(&[(1.0, &ones(a)), (1.0, &ones(b))]));
                put("TA", combine(&[(1.0, &ones(a)), (1.0, &ones(b)), (-1.0, &ones(&q))]));
                put("exact", combine(&[(1.0, a), (1.0, b), (-1.0, &tempered)]));
                put(
                    "clamp",
                    combine(&[
                        (1.0, &clamp_information(a, &tempered)?),
                        (1.0, &clamp_information(b, &tempered)?),
                        (-1.0, &tempered),
                    ]),
                );
                put("fisher", combine(&[(1.0, a), (1.0, b)]));
            }
        }
    }
    let each = |v: &Vec<Vec<f64>>| v.iter().map(|x| ms(x)).collect::<Vec<_>>().join(" ");
    println!("{}", e["name"].as_str().map_or_else(|| e.to_string(), str::to_owned));
    println!("   mean {}   samples {}   {:.1}s", each(&at_mean), each(&sampled), started.elapsed().as_secs_f64());
    if !extra.is_empty() {
        println!("   {}", extra.iter().map(|(k, v)| format!("{k} {}", ms(v))).collect::<Vec<_>>().join("  "));
    }
    Ok(())
}

fn main() {
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        if line.trim().is_empty() {
            continue;
        }
        match serde_json::from_str(&line) {
            Ok(e) => {
                if let Err(err) = experiment(&e) {
                    println!("{line}\n   ERROR {err}");
                }
            }
            Err(err) => println!("{line}: {err}"),
        }
    }
}
