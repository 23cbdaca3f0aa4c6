//! What the demo plays with: a gateway with a quota and faults, and a weir that is configured for it.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::config::{AccessTarget, Address, Config, Rate};
use crate::run::Running;
use crate::simulator::{Fault, Settings, Simulator};

/// The models that are asked in turn.
pub const MODELS: [&str; 2] = ["gpt-4.1-mini", "deepseek-chat"];

/// What there is to set up.
pub struct Scene {
    pub gateway: Settings,
    /// Each model's quota in weir's configuration, as TOML: a little below the gateway's own.
    pub requests: &'static str,
    /// `retry.base_delay`.
    pub base_delay: &'static str,
    /// Ports for clients and for operators, in order of preference; 0 is any that is free.
    pub ports: &'static [(u16, u16)],
}

impl Scene {
    /// What `weir demo` shows.
    pub fn demo() -> Self {
        let quota = Rate { count: 80, period: Duration::from_secs(60), burst: 6 };
        let gateway = Settings {
            requests: Some(quota),
            // The first request to arrive is reset: later, on a connection that was used before, a reset looks like a
            // connection that had been closed, and is no attempt of its own.
            faults: vec![
                (Fault::Unavailable, 0.03),
                (Fault::TooManyWithMillis, 0.03),
                (Fault::ResetBeforeAnswer, 0.02),
                (Fault::ErrorEvent, 0.02),
            ],
            fault_hint: Duration::from_millis(400),
            seed: SEED,
            ..Settings::default()
        };
        Self {
            gateway,
            requests: r#"{ rate = "72/min", burst = 5 }"#,
            base_delay: "250ms",
            ports: &[(8080, 9090), (8080, 0), (0, 9090), (0, 0)],
        }
    }

    /// The gateway's quota, for people.
    pub fn quota_in_words(&self) -> String {
        match self.gateway.requests {
            Some(rate) => format!("each model's quota is {rate}, {} of them at once", rate.burst),
            None => "it has no quota".to_owned(),
        }
    }

    /// weir's configuration, as an operator would write it for this gateway.
    fn config(&self, gateway: SocketAddr, listen: SocketAddr, admin_listen: SocketAddr) -> String {
        let Self { requests, base_delay, .. } = self;
        let [one, other] = MODELS;
        format!(
            r#"[server]
listen = "{listen}"
admin_listen = "{admin_listen}"

[upstream]
base_url = "http://{gateway}/v1"

[limits]
concurrency = 5             # requests under way, all models together

[models."{one}"]     # a little less than the gateway allows
requests = {requests}

[models."{other}"]
requests = {requests}

[retry]
base_delay = "{base_delay}"        # the default is 1s; shorter, so that the demo is
"#
        )
    }
}

/// Makes the gateway fail four of its first 44 requests, each in another way: the 1st, 4th, 6th and 18th to arrive. The
/// 1st and the 4th are different requests, so that none meets with all four.
const SEED: u64 = 60_357;

/// The gateway and weir, serving. Dropped, both stop.
pub struct Stage {
    pub simulator: Simulator,
    pub gateway: SocketAddr,
    /// Where weir serves clients.
    pub address: SocketAddr,
    /// Where it serves operators.
    pub admin_address: SocketAddr,
    /// weir's configuration, with the ports it has.
    pub config: String,
    _weir: Running,
    _serving: JoinSet<()>,
}

impl Stage {
    /// Starts the gateway and weir before it.
    ///
    /// # Errors
    /// That one of them could not be started, the last choice of ports included.
    pub async fn set(scene: &Scene) -> Result<Self, String> {
        let cannot = |error| format!("cannot listen for the simulated gateway: {error}");
        let listener = TcpListener::bind(loopback(0)).await.map_err(cannot)?;
        let gateway = listener.local_addr().map_err(cannot)?;
        let weir = start_weir(scene, gateway)?;
        let tcp = |address: &Address| address.tcp().expect("the demo's configuration names ports");
        let (address, admin_address) = (tcp(&weir.addresses[0]), tcp(&weir.admin_address));
        let simulator = Simulator::new(scene.gateway.clone());
        let mut serving = JoinSet::new();
        let at_work = simulator.clone();
        serving.spawn(async move { at_work.serve(listener).await });
        let config = scene.config(gateway, address, admin_address);
        Ok(Self { simulator, gateway, address, admin_address, config, _weir: weir, _serving: serving })
    }
}

/// Starts weir on the first ports that are free.
fn start_weir(scene: &Scene, gateway: SocketAddr) -> Result<Running, String> {
    let start = |ports: &(u16, u16)| {
        let config = scene.config(gateway, loopback(ports.0), loopback(ports.1));
        let mut config = Config::parse(&config, &|_| None).map_err(|complaints| complaints.to_string())?;
        // The terminal is for what the demo tells.
        config.log.access = AccessTarget::Off;
        Running::start(config)
    };
    let none = Err("the demo has no ports to choose from".to_owned());
    scene.ports.iter().fold(none, |started, ports| started.or_else(|_| start(ports)))
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}
