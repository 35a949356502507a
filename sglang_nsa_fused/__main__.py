from sglang_nsa_fused.tools.cli import main

main(prog_name="sglang-nsa-fused")
