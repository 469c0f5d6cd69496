from idp_peft_cli import main

main()
