//! A training loop in a crate of its own: fit a line with IVON, and ask how sure it is.

use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};
use tch_blr::Ivon;

fn main() -> tch_blr::Result<()> {
    tch::manual_seed(0);
    let x = Tensor::linspace(-1.0, 1.0, 64, (Kind::Float, Device::Cpu)).unsqueeze(1);
    let y = &x * 2.0 + 1.0;

    let vs = nn::VarStore::new(Device::Cpu);
    let line = nn::linear(vs.root(), 1, 1, nn::LinearConfig::default());
    let mut opt = Ivon::default().ess(64.0).beta2(0.99).build(&vs, 0.1)?;
    for _ in 0..500 {
        opt.step(|| (line.forward(&x) - &y).square().mean(Kind::Float) * 0.5)?;
    }

    let q = opt.posterior()?;
    for name in q.names() {
        let value = |t: Option<Tensor>| t.map_or(f64::NAN, |t| t.mean(Kind::Double).double_value(&[]));
        println!("{name} = {:.2} ± {:.2}", value(q.mean(name)), value(q.variance(name)).sqrt());
    }
    Ok(())
}
