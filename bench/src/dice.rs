//! Random numbers that a seed repeats: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).

use std::time::Duration;

/// A sequence of numbers.
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    /// The sequence of this seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `from` to `to`, both included; `from` where there is none between.
    pub(crate) fn between(&mut self, from: u64, to: u64) -> u64 {
        let choices = to.saturating_sub(from).saturating_add(1);
        from + self.next() % choices
    }

    /// True once in `n` times.
    pub(crate) fn once_in(&mut self, n: u64) -> bool {
        self.between(1, n) == 1
    }

    /// A span between these, in milliseconds.
    pub(crate) fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(self.between(from, to))
    }

    /// One of some; `None` of none.
    pub(crate) fn of<'a, T>(&mut self, some: &'a [T]) -> Option<&'a T> {
        some.get(self.between(0, (some.len() as u64).saturating_sub(1)) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_and_bounds_are_reached() {
        let roll = |seed| {
            let mut dice = Dice::new(seed);
            (0..200).map(|_| dice.between(3, 6)).collect::<Vec<_>>()
        };
        assert_eq!(roll(1), roll(1));
        assert_ne!(roll(1), roll(2));
        let all = roll(7);
        assert_eq!((all.iter().min(), all.iter().max()), (Some(&3), Some(&6)));
        assert_eq!(Dice::new(1).between(5, 5), 5);
        assert_eq!(Dice::new(1).of::<u8>(&[]), None);
    }
}
