package jobs_test

func mosrunMain([]string) int { return 0 }
func sumMain([]string) int    { return 0 }
