//! One default rig for the tests that leave it as they found it: starting an Envoy takes seconds.

use std::ops::Deref;
use std::sync::{Arc, LazyLock};

use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::rig::Rig;

/// The shared rig, to one test alone for as long as this lives.
pub struct Shared {
    rig: OwnedMutexGuard<Option<Rig>>,
}

/// Waits for the shared rig: idle, engines without faults, records, counts and caches. What the filter knows of
/// prompts stays: each test uses its own.
pub async fn shared() -> Shared {
    static RIG: LazyLock<Arc<Mutex<Option<Rig>>>> = LazyLock::new(Arc::default);
    let mut rig = Arc::clone(&RIG).lock_owned().await;
    match &*rig {
        None => *rig = Some(Rig::start().await),
        Some(rig) => {
            rig.until_idle().await;
            for engine in rig.engines() {
                engine.set_refuse(false);
                engine.set_faults("").expect("blank clears the faults");
                engine.clear_cache();
                engine.reset_stats();
                engine.clear_requests();
            }
        }
    }
    Shared { rig }
}

impl Deref for Shared {
    type Target = Rig;

    fn deref(&self) -> &Rig {
        self.rig.as_ref().expect("there is one while this lives")
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The next test gets one that nothing has happened to.
        if std::thread::panicking() {
            self.rig.take();
        }
    }
}
