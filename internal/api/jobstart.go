package api

import "encoding/json"

// What a program is given are bytes and not text: a file name in Latin-1 is a
// good argument, and a JSON string would make another one of it. So argv, env and dir
// travel in base64, which also bounds how much an odd environment grows.

type plainStart JobStart

type jobStart struct {
	*plainStart
	Argv [][]byte `json:"argv"`
	Env  [][]byte `json:"env"`
	Dir  []byte   `json:"dir"`
}

// MarshalJSON keeps each byte of argv, env and dir.
func (s JobStart) MarshalJSON() ([]byte, error) {
	return json.Marshal(jobStart{plainStart: (*plainStart)(&s), Argv: bytesOf(s.Argv), Env: bytesOf(s.Env), Dir: []byte(s.Dir)})
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (s *JobStart) UnmarshalJSON(data []byte) error {
	in := jobStart{plainStart: (*plainStart)(s)}
	if err := json.Unmarshal(data, &in); err != nil {
		return err
	}
	s.Argv, s.Env, s.Dir = stringsOf(in.Argv), stringsOf(in.Env), string(in.Dir)
	return nil
}

func bytesOf(list []string) [][]byte {
	out := make([][]byte, len(list))
	for i, s := range list {
		out[i] = []byte(s)
	}
	return out
}

func stringsOf(list [][]byte) []string {
	out := make([]string, len(list))
	for i, b := range list {
		out[i] = string(b)
	}
	return out
}
