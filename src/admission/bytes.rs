//! The memory that request bodies take, all together, and how much of it each tenant may take.
//!
//! A tenant may hold at most `ALPHA` (8) times its weight times what is still free: dynamic thresholds, by Choudhury and
//! Hahne ("Dynamic queue length thresholds for shared-memory packet switches", IEEE/ACM Transactions on Networking 6,
//! 1998). One that is alone can use 8/9 of the memory, and the next to come finds the rest. It leaves the first above a
//! threshold that has sunk: what the first gives back it cannot take again, until both hold as much.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clients::Tenant;
use crate::config::Weight;

/// How many times what is free a tenant of weight 1 may hold.
const ALPHA: u64 = 8;

/// A bound on bytes held, shared by all requests.
#[derive(Debug, Clone)]
pub struct ByteBudget(Arc<Budget>);

#[derive(Debug)]
struct Budget {
    limit: AtomicU64,
    held: AtomicU64,
    /// Those who have a request under way. Locked when a request begins to be read, and when its bytes are given back.
    tenants: Mutex<HashMap<Tenant, Holder>>,
}

/// What one tenant holds.
#[derive(Debug, Default)]
struct Holder {
    held: Arc<AtomicU64>,
    requests: usize,
}

/// Bytes held by one request; given back when dropped.
#[derive(Debug)]
pub struct HeldBytes {
    budget: Arc<Budget>,
    tenant: Tenant,
    weight: Weight,
    /// Of all the tenant's requests.
    of_tenant: Arc<AtomicU64>,
    bytes: u64,
}

/// Why no more bytes can be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoRoom {
    /// Everyone together holds all there is.
    Full,
    /// The tenant holds its share.
    Share,
}

impl ByteBudget {
    /// Room for `limit` bytes.
    pub fn new(limit: u64) -> Self {
        let (limit, held) = (AtomicU64::new(limit), AtomicU64::new(0));
        Self(Arc::new(Budget { limit, held, tenants: Mutex::default() }))
    }

    /// Changes how much room there is. Where more is held already, that stays, and no more is taken until it is less.
    pub fn set_limit(&self, limit: u64) {
        self.0.limit.store(limit, Ordering::Relaxed);
    }

    /// Nothing held yet, to be grown.
    pub fn hold(&self, tenant: Tenant, weight: Weight) -> HeldBytes {
        let mut tenants = self.0.tenants();
        let holder = tenants.entry(tenant).or_default();
        holder.requests += 1;
        HeldBytes { budget: self.0.clone(), tenant, weight, of_tenant: holder.held.clone(), bytes: 0 }
    }

    /// Bytes held now.
    pub fn held(&self) -> u64 {
        self.0.held.load(Ordering::Relaxed)
    }
}

impl Budget {
    fn tenants(&self) -> MutexGuard<'_, HashMap<Tenant, Holder>> {
        self.tenants.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HeldBytes {
    /// Takes `more` bytes.
    ///
    /// # Errors
    /// There is no room for them; nothing is taken.
    pub fn grow(&mut self, more: usize) -> Result<(), NoRoom> {
        let more = more as u64;
        let limit = self.budget.limit.load(Ordering::Relaxed);
        let before = add_within(&self.budget.held, more, limit).ok_or(NoRoom::Full)?;
        let share = share(self.weight, limit - (before + more));
        // Another may see the bytes that are about to be given back, and take its share for a little smaller than it is.
        if add_within(&self.of_tenant, more, share).is_none() {
            self.budget.held.fetch_sub(more, Ordering::Relaxed);
            return Err(NoRoom::Share);
        }
        self.bytes += more;
        Ok(())
    }
}

impl Drop for HeldBytes {
    fn drop(&mut self) {
        self.of_tenant.fetch_sub(self.bytes, Ordering::Relaxed);
        self.budget.held.fetch_sub(self.bytes, Ordering::Relaxed);
        let mut tenants = self.budget.tenants();
        let Entry::Occupied(mut holder) = tenants.entry(self.tenant) else {
            unreachable!("a tenant is listed as long as a request of its is")
        };
        holder.get_mut().requests -= 1;
        if holder.get().requests == 0 {
            holder.remove();
        }
    }
}

/// Adds `more` if that stays within `limit`; says what it was before.
fn add_within(held: &AtomicU64, more: u64, limit: u64) -> Option<u64> {
    let within = |held: u64| held.checked_add(more).filter(|after| *after <= limit);
    held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).ok()
}

/// What a tenant may hold while so much is free.
fn share(weight: Weight, free: u64) -> u64 {
    let share = u128::from(free) * u128::from(ALPHA * u64::from(weight.thousandths())) / 1000;
    u64::try_from(share).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    fn peer(number: u8) -> Tenant {
        Tenant::Peer([10, 0, 0, number].into())
    }

    /// How many bytes a request of this tenant's can take, one after the other.
    fn fill(held: &mut HeldBytes) -> u64 {
        while held.grow(1).is_ok() {}
        held.bytes
    }

    #[test]
    fn bytes_are_held_up_to_the_limit_and_given_back_on_drop() {
        let budget = ByteBudget::new(10);
        let (mut a, mut b) = (budget.hold(peer(1), Weight::ONE), budget.hold(peer(2), Weight::ONE));
        assert!(a.grow(6).is_ok() && b.grow(3).is_ok());
        assert_eq!((a.grow(2), budget.held()), (Err(NoRoom::Full), 9));
        drop(a);
        assert_eq!(budget.held(), 3);
        assert!(b.grow(5).is_ok());
        assert_eq!(b.grow(usize::MAX), Err(NoRoom::Full));
        drop(b);
        assert_eq!(budget.held(), 0);
    }

    #[test]
    fn with_less_room_than_is_held_nothing_is_taken_until_enough_came_back() {
        let budget = ByteBudget::new(100);
        let (mut a, mut b) = (budget.hold(peer(1), Weight::ONE), budget.hold(peer(2), Weight::ONE));
        assert!(a.grow(50).is_ok());
        budget.set_limit(40);
        assert_eq!((b.grow(1), budget.held()), (Err(NoRoom::Full), 50));
        drop(a);
        assert!(b.grow(30).is_ok());
    }

    #[test]
    fn who_is_alone_can_use_eight_ninths() {
        let budget = ByteBudget::new(900);
        let mut first = budget.hold(peer(1), Weight::ONE);
        assert_eq!(fill(&mut first), 800);
        assert_eq!(first.grow(1), Err(NoRoom::Share));
        assert_eq!(budget.hold(peer(1), Weight::ONE).grow(1), Err(NoRoom::Share), "its other requests count too");
        assert_eq!(budget.held(), 800, "what was refused was given back");
    }

    #[test]
    fn a_newcomer_finds_room_when_another_has_filled_its_share() {
        let budget = ByteBudget::new(810);
        let mut first = budget.hold(peer(1), Weight::ONE);
        let mut second = budget.hold(peer(2), Weight::ONE);
        let mut third = budget.hold(peer(3), Weight::ONE);
        assert_eq!([fill(&mut first), fill(&mut second), fill(&mut third)], [720, 80, 8]);
        drop((first, second));
        assert_eq!(fill(&mut third), 720, "and has the others' room when they are gone");
    }

    #[test]
    fn the_shares_even_out_as_requests_end() {
        let budget = ByteBudget::new(1700);
        let request = |tenant| {
            let mut held = budget.hold(tenant, Weight::ONE);
            held.grow(10).map(|()| held)
        };
        let mut under_way: VecDeque<HeldBytes> = std::iter::from_fn(|| request(peer(1)).ok()).collect();
        for _ in 0..1000 {
            // The greedy one is always the first to ask.
            under_way.extend([peer(1), peer(2)].into_iter().filter_map(|tenant| request(tenant).ok()));
            under_way.pop_front();
        }
        let held = |tenant| under_way.iter().filter(|held| held.tenant == tenant).count();
        assert!(held(peer(1)).abs_diff(held(peer(2))) <= 8, "{} and {}", held(peer(1)), held(peer(2)));
    }

    #[test]
    fn a_heavier_tenant_may_hold_more() {
        let budget = ByteBudget::new(10_000);
        let weight = |number| Weight::new(number).expect("a weight");
        assert_eq!(fill(&mut budget.hold(peer(1), weight(3.0))), 10_000 * 24 / 25);
        assert_eq!(fill(&mut budget.hold(peer(1), weight(0.125))), 5_000);
        assert_eq!(share(weight(1000.0), u64::MAX), u64::MAX);
    }

    #[test]
    fn nothing_is_kept_of_a_tenant_without_requests() {
        let budget = ByteBudget::new(10);
        let (first, second) = (budget.hold(peer(1), Weight::ONE), budget.hold(peer(1), Weight::ONE));
        drop(first);
        assert_eq!(budget.0.tenants().len(), 1);
        drop(second);
        assert!(budget.0.tenants().is_empty());
    }
}
