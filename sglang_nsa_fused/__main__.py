from sglang_nsa_fused.cli import main

main(prog_name="sglang-nsa-fused")
