//! A whole program: data, network, optimizer, loop, posterior, and a prediction that knows how sure it is.
use tch::nn::{self, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::{Ivon, Rule};

fn main() -> tch_blr::Result<()> {
    tch::manual_seed(0);
    let x = Tensor::rand([200, 1], (Kind::Float, Device::Cpu)) * 4 - 2; // data from -2 to 2 only
    let y = (&x * 2).sin() + x.randn_like() * 0.1;

    let vs = VarStore::new(Device::Cpu);
    let layer = |name, i, o| nn::linear(vs.root() / name, i, o, nn::LinearConfig::default());
    let net = nn::seq().add(layer("hidden", 1, 32)).add_fn(Tensor::tanh).add(layer("output", 32, 1));
    let mut opt = Ivon::default().ess(200.0).hess_init(1.0).weight_decay(1e-3).beta2(0.999).build(&vs, 0.1)?;
    for _ in 0..3000 {
        opt.step(|| tch_blr::nn::squared_error(&net.forward(&x), &y, 0.01))?; // noise of variance 0.01
    }

    let at = Tensor::linspace(-4.0, 4.0, 9, (Kind::Float, Device::Cpu)).unsqueeze(1);
    let f = opt.posterior()?.predict_samples(&vs, 200, || net.forward(&at))?; // [200, 9, 1]
    let (mean, sd) = (f.mean_dim(0, false, Kind::Float), f.std_dim(0, true, false));
    let number = |t: &Tensor, i| t.double_value(&[i, 0]);
    (0..9).for_each(|i| println!("f({:2}) = {:5.2} ± {:.2}", number(&at, i), number(&mean, i), number(&sd, i)));
    Ok(())
}
