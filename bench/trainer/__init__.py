"""`make bench-trainer`: one optimizer step of N adapters, ours against four ways to do the same with other code."""
