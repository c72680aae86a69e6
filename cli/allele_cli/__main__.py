from allele_cli.main import main

main()
