//! The little statistics that the evidence needs.

use std::time::Duration;

/// The value at quantile `q` (0 to 1) by nearest rank; zero for an empty slice. Sorts the slice.
pub fn quantile(values: &mut [Duration], q: f64) -> Duration {
    values.sort_unstable();
    let Some(last) = values.len().checked_sub(1) else { return Duration::ZERO };
    let rank = (q * values.len() as f64).ceil() as usize;
    values[rank.saturating_sub(1).min(last)]
}

/// How many standard deviations `hits` of `trials` lie from a share of `p`: beyond 3.3 chance gives it once in
/// a thousand runs.
pub fn deviation(hits: u64, trials: u64, p: f64) -> f64 {
    let expected = trials as f64 * p;
    let sigma = (expected * (1.0 - p)).sqrt();
    if sigma == 0.0 { 0.0 } else { (hits as f64 - expected) / sigma }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_rank() {
        let mut values: Vec<_> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(quantile(&mut values, 0.5), Duration::from_millis(50));
        assert_eq!(quantile(&mut values, 0.99), Duration::from_millis(99));
        assert_eq!(quantile(&mut [], 0.5), Duration::ZERO);
    }

    #[test]
    fn deviation_of_an_even_split() {
        assert!(deviation(900, 1000, 0.9).abs() < 1e-9);
        assert!((deviation(930, 1000, 0.9) - 3.162).abs() < 0.01);
        assert!(deviation(500, 1000, 0.9) < -40.0);
    }
}
