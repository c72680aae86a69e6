"""Commands of drivers: executed in order by one thread, each exactly once."""
