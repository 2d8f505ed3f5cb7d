"""How much noise, where and when: schedules of sigma, per-position training levels, and generation paths."""
