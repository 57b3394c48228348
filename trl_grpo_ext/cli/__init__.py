"""The console command `trl-grpo`: one module per subcommand."""
