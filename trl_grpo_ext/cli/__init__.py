"""The console command `trl-grpo`: one module per subcommand; `main.py` has the list."""
