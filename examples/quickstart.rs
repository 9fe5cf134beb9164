//! A whole program: data, network, optimizer, loop, posterior, and predictions that know how sure they are.
use tch::nn::{self, LinearConfig, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::Ivon;

fn main() -> tch_blr::Result<()> {
    tch::manual_seed(0);
    let y = Tensor::randint(2, [200], (Kind::Int64, Device::Cpu));
    let x = y.unsqueeze(1) * 2 - 1 + Tensor::randn([200, 2], (Kind::Float, Device::Cpu)) * 0.5;
    let vs = VarStore::new(Device::Cpu);
    let layer = |name, i, o| nn::linear(vs.root() / name, i, o, LinearConfig::default());
    let net = nn::seq().add(layer("hidden", 2, 32)).add_fn(Tensor::tanh).add(layer("output", 32, 2));
    let mut opt = Ivon::default().ess(200.0).hess_init(0.1).weight_decay(5e-3).beta2(0.999).build(&vs, 0.1)?;
    for _ in 0..1000 {
        opt.step(|| net.forward(&x).cross_entropy_for_logits(&y))?;
    }
    let places = ["among class 1", "among class 0", "between them", "far from both"];
    let at = Tensor::from_slice2(&[[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0], [4.0, -4.0]]).to_kind(Kind::Float);
    let p = opt.posterior()?.predict(&vs, 100, || net.forward(&at).softmax(-1, Kind::Float))?;
    for (i, place) in (0..).zip(places) {
        let (one, doubt) = (p.mean.double_value(&[i, 1]), p.mutual_information.double_value(&[i]));
        println!("{place}: class 1 with probability {one:.2}, {doubt:.3} nats of doubt that data could resolve");
    }
    Ok(())
}
